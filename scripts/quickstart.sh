#!/usr/bin/env bash
# Trains a GPT with QISA attention and a classical one on English text, compares them and writes runs/quickstart/.
# Then runs the trained circuits as QNodes: some steps of training on lightning.qubit, evaluation on two devices, and
# gradients by device and method, all beside what the folded model gives.
# The first call installs everything that is needed into .venv; see scripts/environment.sh for the settings.
# With arguments only `qattn compare` runs, with them, for example: bash scripts/quickstart.sh --help
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

use_environment fast
cd -- "$qattn_root"
# Threads that wait for each other asleep lose little on an idle machine, and do not starve on a busy one.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
qattn compare --config configs/quickstart.yaml "$@"
if (($# == 0)); then
    qattn cross-check --checkpoint runs/quickstart/qisa
fi
