#!/usr/bin/env bash
# Checks a release, and puts the archives that passed into dist/: one version in all files, a source archive and a wheel
# that hold what they should, and a wheel that runs the quickstart, certifies and writes text where nothing else is. Prints
# a line for each thing it checked; the first fault ends it.
#
#   bash scripts/release.sh
#
# What is built are the files that git knows or would add, as they are now. The wheel goes into a fresh environment in
# a temporary folder (TMPDIR; two gigabytes, or more with CUDA), under the pinned versions; see environment.sh for the
# settings.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

(($# == 0)) || fail "scripts/release.sh takes no arguments; got $1"
use_environment release
cd -- "$qattn_root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
check=("$VIRTUAL_ENV/bin/python" scripts/check_release.py)
version="$("${check[@]}" version .)" || exit 1

work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT

# From a copy: what earlier builds left, in build/ or *.egg-info, finds its way into archives otherwise.
mkdir -- "$work/sources" "$work/elsewhere"
git ls-files -z --cached --others --exclude-standard 2>"$work/log" >"$work/files" ||
    fail "git cannot list the files here; make the release in a git checkout"
tar --null -T "$work/files" -cf - 2>"$work/log" | tar -xf - -C "$work/sources" ||
    fail "a file that git lists cannot be copied ($(head -n 1 "$work/log")); restore it, or git rm it"

python -m build --no-isolation --outdir "$work/dist" "$work/sources" >"$work/log" 2>&1 || {
    cat -- "$work/log" >&2
    fail "the archives cannot be built, for the reason above"
}
echo "built: a source archive, and a wheel from it"
python -m twine --no-color check --strict "$work/dist"/* >"$work/log" 2>&1 || {
    cat -- "$work/log" >&2
    fail "twine refuses the archives, for the reason above"
}
echo "metadata: twine finds no fault"
"${check[@]}" archives "$work/sources" "$work/dist"

python="$(find_python)" || exit 1
read -r -a pip_args <<<"${QATTN_PIP_ARGS:-}" || true
"$python" -m venv "$work/venv" || fail "$python could not make a virtual environment in $work"
PIP_USER=0 "$work/venv/bin/python" -m pip install --disable-pip-version-check --quiet \
    --constraint scripts/constraints.txt ${pip_args[@]+"${pip_args[@]}"} "$work/dist"/*.whl >"$work/log" 2>&1 || {
    cat -- "$work/log" >&2
    fail "the wheel cannot be installed, for the reason above"
}
"$work/venv/bin/python" -m pip --disable-pip-version-check check >"$work/log" 2>&1 ||
    fail "packages that were installed with the wheel do not fit together: $(head -n 1 "$work/log")"
echo "installed: the wheel alone, into a fresh environment, under the pinned versions"

# From here on nothing of the sources is in reach.
unset PYTHONPATH
cp -- scripts/check_release.py "$work/elsewhere"
cd -- "$work/elsewhere"
export PATH="$work/venv/bin:$PATH" VIRTUAL_ENV="$work/venv"
python -I check_release.py installed "$version"

# run WORD COMMAND... runs a command silently, and says so, or shows what it said where it fails.
run() {
    local word="$1"
    shift
    "$@" >"$work/log" 2>&1 || {
        cat -- "$work/log" >&2
        fail "$* ended with status $?, for the reason above"
    }
    echo "$word: $*"
}

# The quickstart (scripts/quickstart.sh), with fewer steps, and what else a wheel has to do.
run compared qattn compare --config "$work/sources/configs/quickstart.yaml" --sample_length 8 \
    --fit.data '{"corpus": "pydoc", "batch_size": 8, "eval_windows": 16}' \
    --fit.trainer '{"max_steps": 4, "val_check_interval": 2}'
run cross-checked qattn cross-check --checkpoint runs/quickstart/qisa
run certified qattn certify runs/quickstart/qisa
run wrote qattn generate --checkpoint runs/quickstart/qisa --prompt "The " --max_new_tokens 8

mkdir -p -- "$qattn_root/dist"
find "$qattn_root/dist" -mindepth 1 -maxdepth 1 -name 'pennylane_qattn-*' -delete
cp -- "$work/dist"/* "$qattn_root/dist"
echo "release $version: all is well; the archives are in dist/"
