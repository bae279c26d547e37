#!/usr/bin/env bash
# Makes, or reuses, the Python environment that the other scripts run in: a virtual environment with this project,
# editable, and the pinned versions of scripts/constraints.txt.
#
#   bash scripts/environment.sh [EXTRAS]                     by hand; EXTRAS as in setup.cfg, for example test,hf
#   source scripts/environment.sh; use_environment [EXTRAS]  in a script; puts the environment first in PATH
#
# QATTN_VENV         folder of the environment (.venv in the project's folder)
# QATTN_PYTHON       interpreter to make it with (the first Python 3.11 or newer in PATH)
# QATTN_CONSTRAINTS  file of versions to install under instead of scripts/constraints.txt; /dev/null for the newest
# QATTN_PIP_ARGS     further arguments for `pip install`, separated by spaces; for example a package index that holds
#                    torch without CUDA
#
# The file qattn-environment inside says what the environment was made for, or that its making is under way. So
# nothing is done when nothing changed, an interrupted installation is started afresh, and a folder that was not made
# here is never touched.

set -euo pipefail

qattn_root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $1" >&2
    exit 1
}

# Whether $1 runs and is Python 3.11 or newer.
is_recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 </dev/null
}

# Prints the interpreter to make an environment with. 3.11 comes first: scripts/constraints.txt was made with it.
find_python() {
    local candidate
    if [[ -n "${QATTN_PYTHON:-}" ]]; then
        is_recent_python "$QATTN_PYTHON" ||
            fail "QATTN_PYTHON=$QATTN_PYTHON is no working Python 3.11 or newer; set it to one, or unset it"
        echo "$QATTN_PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if is_recent_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer in PATH; install one, or set QATTN_PYTHON to its path"
}

# `environment_record read|write FOLDER EXTRAS` reads or writes what the environment in a folder was made for. Reading
# prints what is left to do (see environment_state), and fails where the environment cannot be used.
environment_record() {
    "$2/bin/python" -I -S - "$1" "$2/qattn-environment" "$3" "$qattn_root" "$(constraints_file)" \
        "${QATTN_PYTHON:+$(python_version)}" <<'PYTHON'
import hashlib
import json
import os
import platform
import sys

action, path, extras, root, constraints, wanted_python = sys.argv[1:]
extras = {extra for extra in extras.split(",") if extra}
digest = hashlib.sha256()
for name in (os.path.join(root, "setup.cfg"), constraints):
    with open(name, "rb") as file:
        digest.update(file.read())
now = {"project": root, "python": platform.python_version(), "requirements": digest.hexdigest()}
if action == "write":
    with open(path, "w") as file:  # in place: this very file is locked; a torn one means an unusable environment
        json.dump({**now, "extras": sorted(extras)}, file, indent=1)
    sys.exit()
with open(path) as file:
    made = json.load(file)
if (made["project"], made["python"]) != (root, wanted_python or now["python"]) or made["python"] != now["python"]:
    sys.exit("made for another place or another Python")
if made["requirements"] == now["requirements"] and extras <= set(made["extras"]):
    print("ready")
else:
    print("install", ",".join(sorted(extras | set(made["extras"]))))
PYTHON
}

python_version() {
    "$QATTN_PYTHON" -c 'import platform; print(platform.python_version())'
}

# Prints the file of versions to install under.
constraints_file() {
    local file="${QATTN_CONSTRAINTS:-$qattn_root/scripts/constraints.txt}"
    [[ "$file" == /* ]] || file="$PWD/$file"
    echo "$file"
}

# What is to be done for the environment in folder $1 to hold the extras $2. Prints one of
#   ready            nothing
#   install EXTRAS   install into it, with these extras
#   make             make it, or make it anew
environment_state() {
    if [[ -e "$1/qattn-environment" ]]; then
        environment_record read "$1" "$2" 2>/dev/null || echo make
    elif [[ ! -e "$1" ]] || [[ -d "$1" && -z "$(ls -A -- "$1")" ]]; then
        echo make
    else
        fail "$1 exists and was not made by scripts/environment.sh; remove it, or set QATTN_VENV to another folder"
    fi
}

# Makes the environment in folder $1 hold the extras $2.
make_environment() {
    local venv="$1" extras="$2" python state constraints
    local -a pip_args=()
    python="$(find_python)" || exit 1
    constraints="$(constraints_file)"
    mkdir -p -- "$venv" 2>/dev/null || fail "cannot make the folder $venv; set QATTN_VENV to another one"

    # One installation at a time. The lock belongs to file descriptor 9, which stays open until the work is done.
    { exec 9>>"$venv/qattn-environment"; } 2>/dev/null || fail "cannot write to $venv; set QATTN_VENV to another folder"
    if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
        echo "Waiting for another installation into $venv ..." >&2
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    fi
    state="$(environment_state "$venv" "$extras")" || exit 1
    if [[ "$state" == ready ]]; then
        exec 9>&-
        return
    fi
    echo "incomplete" >"$venv/qattn-environment"
    if [[ "$state" == make ]]; then
        echo "Making a Python environment in $venv ..." >&2
        find "$venv" -mindepth 1 -maxdepth 1 ! -name qattn-environment -exec rm -rf -- {} +
        "$python" -m venv "$venv" >&2 ||
            fail "$python could not make a virtual environment; on Debian and Ubuntu install python3-venv"
    else
        extras="${state#install }"
    fi
    echo "Installing the packages of $constraints${extras:+ with the extras $extras} ..." >&2
    read -r -a pip_args <<<"${QATTN_PIP_ARGS:-}" || true
    (
        cd -- "$qattn_root" &&
            PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check \
                --constraint "$constraints" ${pip_args[@]+"${pip_args[@]}"} \
                --editable ".${extras:+[$extras]}" >&2
    ) || fail "the installation failed, for the reason above; the next call starts it afresh"
    environment_record write "$venv" "$extras"
    exec 9>&-
}

# Makes the environment ready, with the extras $1 at least, and puts it first in PATH.
use_environment() {
    local extras="${1:-}" venv="${QATTN_VENV:-$qattn_root/.venv}" state
    [[ "$venv" == /* ]] || venv="$PWD/$venv"
    [[ "$venv" == / ]] || venv="${venv%/}"
    unset PYTHONHOME
    if [[ -n "${QATTN_PYTHON:-}" ]]; then
        find_python >/dev/null || exit 1
    fi
    if [[ ! -r "$(constraints_file)" || -d "$(constraints_file)" ]]; then
        fail "QATTN_CONSTRAINTS=${QATTN_CONSTRAINTS:-} is no file that can be read; set it to one, or unset it"
    fi
    state="$(environment_state "$venv" "$extras")" || exit 1
    if [[ "$state" != ready ]]; then
        make_environment "$venv" "$extras"
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    use_environment "${1:-}"
    echo "$VIRTUAL_ENV"
fi
