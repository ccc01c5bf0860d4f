#!/usr/bin/env bash
# Builds .venv from requirements.txt; `make setup` calls it when .venv is absent or older than the lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Clusters' module systems export these; they would mix another Python's packages into ours.
unset PYTHONHOME PYTHONPATH

stamp=.venv/.setup-done

# megatron-core ships its compiled helpers for 3.12 and 3.13. A name on PATH proves nothing
# (pyenv's shims exist for versions that are not active), so every candidate is run.
usable() {
    "$1" -c 'import sys, ctypes, ensurepip, ssl, venv; sys.exit(sys.version_info[:2] not in [(3, 12), (3, 13)])' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    local candidates=(python3.12 python3.13 python3)
    if command -v uv >/dev/null; then
        candidates+=("$(uv python find '>=3.12,<3.14' --no-project 2>/dev/null || true)")
    fi
    candidates+=("${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23].*/bin/python3)
    for candidate in "${candidates[@]}"; do
        if [[ -n $candidate ]] && usable "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    echo "setup: error: found no Python 3.12 or 3.13 that can make a virtual environment;" \
        "install one (Debian and Ubuntu: python3.12 and python3.12-venv; with uv: uv python install 3.12)." >&2
    return 1
}

# Without a stamp, .venv is what an interrupted set-up left: begin anew (downloads are in uv's cache).
if [[ -e $stamp ]] && usable .venv/bin/python; then
    rm "$stamp"
    echo "setup: bringing .venv up to date ($(.venv/bin/python --version))"
else
    base=$(find_python)
    echo "setup: making .venv with $("$base" --version), $base"
    "$base" -m venv --clear .venv
fi

echo "setup: installing uv into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r launch/uv-requirements.txt

echo "setup: installing the $(grep -c '^[a-z].*==' requirements.txt) locked packages (some GB of downloads the first time)"
# The system's certificates: a company's or a cluster's proxy is known there, not in uv's own list.
# Bytecode at once: some sites forbid writing it later, and every import would then compile torch anew.
export UV_SYSTEM_CERTS=1 UV_HTTP_TIMEOUT=300 UV_COMPILE_BYTECODE=1 UV_PYTHON="$PWD/.venv/bin/python"
.venv/bin/uv pip install --quiet --require-hashes --build-constraints requirements.txt -r requirements.txt
# hatchling is in the lock, so building llada needs nothing else.
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation -e .

# Last, so that an interrupted set-up does not count as done.
touch "$stamp"
echo "setup: done in $SECONDS s; try .venv/bin/llada --help"
