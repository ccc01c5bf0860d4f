#!/usr/bin/env bash
# Ten minutes on one GPU: what of tests, benchmarks and plans they are worth most for (docs/gpu.md, "A device day").
#
#   launch/gpu_day.sh [--minutes N] [--out DIR] [--dry]           in .venv, after make setup
#   launch/gpu_day.sh --wheels DIR [--python PYTHON] [...]        a Python that has torch for CUDA, and nothing fetched
#   launch/gpu_day.sh --collect DIR                               on a connected machine: what --wheels installs
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
unset PYTHONHOME

fail() {
    echo "gpu_day: error: $1" >&2
    exit 2
}

python= wheels= collect= out=runs/gpu_day
rest=()
while (($#)); do
    case $1 in
        --wheels | --python | --collect | --out | --minutes) (($# > 1)) || fail "$1 needs a value" ;;&
        --wheels) wheels=$2 && shift 2 ;;
        --python) python=$2 && shift 2 ;;
        --collect) collect=$2 && shift 2 ;;
        --out) out=$2 && shift 2 ;;
        --minutes) rest+=("$1" "$2") && shift 2 ;;
        --dry) rest+=("$1") && shift ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        *) fail "$1 is no option: give --minutes, --out, --dry, --wheels, --python or --collect" ;;
    esac
done
out=$(realpath -m "$out")
[[ -z $wheels ]] || wheels=$(realpath -e "$wheels") || fail "--wheels $wheels is no folder"
[[ -z $collect ]] || collect=$(realpath -m "$collect")
cd "$root"

if [[ -z $python ]]; then
    python=.venv/bin/python
    [[ -z $wheels ]] || python=python3
    command -v "$python" >/dev/null || fail "there is no $python: run make setup, or give --wheels DIR and --python"
fi
"$python" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 12), (3, 13)])' ||
    fail "$python is no Python 3.12 or 3.13: name one by --python"
if [[ -n $collect ]]; then
    exec "$python" -m tests.gpu.wheels "$collect"
fi

export PYTHONPATH=$root
if [[ -n $wheels ]]; then
    # Beside that Python, which may be nobody's to write to; no dependencies, which would ask for a torch.
    packages=$out/packages
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
        --target "$packages" "$wheels"/*.whl || fail "these wheels do not install into $packages: see above"
    export PYTHONPATH=$root:$packages
fi
exec "$python" -m tests.gpu.day --out "$out" "${rest[@]}"
