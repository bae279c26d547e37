#!/usr/bin/env bash
# Trains the reference recipe over three seeds: classical attention and causal qisa-absorbed on Tiny Shakespeare, which
# is downloaded unless QATTN_DATA names a folder that holds tinyshakespeare.txt. Writes runs/baseline-shakespeare/.
# A run that was stopped goes on where it was. Arguments go on to `qattn compare`.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

use_environment fast
cd -- "$qattn_root"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec qattn compare --config configs/compare-baseline.yaml "$@"
