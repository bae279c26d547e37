#!/usr/bin/env bash
# Builds the documentation into docs/_build/html, from nothing, and runs every example of the gallery on the way. A
# warning fails the build, and so does an example.
#
#   bash scripts/docs.sh [arguments of sphinx-build ...]
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

use_environment docs,hf
cd -- "$qattn_root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
# What is left of an earlier build would hide that a page is gone, or that an example no longer runs.
rm -rf docs/_build docs/gallery
python -m sphinx --builder html --fail-on-warning --keep-going "$@" docs docs/_build/html
