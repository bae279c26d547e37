#!/usr/bin/env bash
# Lints the code, checks its types and runs the tests; fails if any of these finds a fault. Installs what that needs; see environment.sh.
#
#   bash scripts/test.sh [--slow] [--plugins] [--docs] [--coverage] [arguments of pytest ...]
#
# --slow     runs the slow tests too, and checks the shapes of every test's calls against signatures, not of some alone
# --plugins  installs the devices of PennyLane's partners (the extra `plugins`), and runs the tests on them and nothing
#            else
# --docs     builds the documentation (docs.sh), with every example in it, and runs the tests of the pages and nothing
#            else
# --coverage prints, file by file, the lines of the packages that no test ran
# Two processes run the tests side by side; `-n 0` runs them in one.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

arguments=() extras=test,hf,fast docs=0
for argument in "$@"; do
    case "$argument" in
    --slow) arguments+=(-m "not plugins" --all-shapes) ;;
    --plugins) arguments+=(-m plugins) extras=test,hf,fast,plugins ;;
    --coverage) arguments+=(--cov=pennylane_qattn --cov=lightning_modules --cov-report=term-missing:skip-covered) ;;
    --docs) docs=1 extras=test,hf,fast,docs ;;
    *) arguments+=("$argument") ;;
    esac
done

use_environment "$extras"
cd -- "$qattn_root"
# The processes share the cores between them, one thread each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"

if ((docs)); then
    built=0
    bash scripts/docs.sh || built=$?
    # the slow tests of the pages too: they run the commands of the page to begin with
    QATTN_SITE=docs/_build/html python -m pytest -n 2 -m "not plugins" ${arguments[@]+"${arguments[@]}"} \
        tests/test_docs*.py
    exit "$built"
fi

lint=0
ruff check . || lint=1
ruff format --check . || lint=1
types=0
python -m mypy || types=1
tests=0
python -m pytest -n 2 ${arguments[@]+"${arguments[@]}"} || tests=$?

if ((lint)); then
    echo "error: ruff found faults, shown above the tests; 'ruff check --fix .' and 'ruff format .' mend most" >&2
fi
if ((types)); then
    echo "error: mypy found faults, shown above the tests; [tool.mypy] in pyproject.toml says what it is asked" >&2
fi
if ((tests)); then
    exit "$tests"
fi
exit "$((lint | types))"
