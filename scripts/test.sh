#!/usr/bin/env bash
# Lints the code and runs the tests; fails if either finds a fault. Installs what that needs; see environment.sh.
#
#   bash scripts/test.sh [--slow] [--plugins] [arguments of pytest ...]
#
# --slow     runs the slow tests too
# --plugins  installs the devices of PennyLane's partners (the extra `plugins`), and runs the tests on them and nothing
#            else
# Two processes run the tests side by side; `-n 0` runs them in one.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

arguments=() extras=test,hf,fast
for argument in "$@"; do
    case "$argument" in
    --slow) arguments+=(-m "not plugins") ;;
    --plugins) arguments+=(-m plugins) extras=test,hf,fast,plugins ;;
    *) arguments+=("$argument") ;;
    esac
done

use_environment "$extras"
cd -- "$qattn_root"
# The processes share the cores between them, one thread each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"

lint=0
ruff check . || lint=1
ruff format --check . || lint=1
tests=0
python -m pytest -n 2 ${arguments[@]+"${arguments[@]}"} || tests=$?

if ((lint)); then
    echo "error: ruff found faults, shown above the tests; 'ruff check --fix .' and 'ruff format .' mend most" >&2
fi
if ((tests)); then
    exit "$tests"
fi
exit "$lint"
