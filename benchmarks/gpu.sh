#!/usr/bin/env bash
# All that wants a GPU: the kernels' numerics as compiled code, then every benchmark; at the end the pages, and a summary.
#   bash benchmarks/gpu.sh [PYTHON] [first|rest|dry]     results go to benchmarks/results/, one file a device
# first (the default) has rows of every kind and stops by itself after BUDGET seconds (480): what was done is kept, what
# was not is named. rest adds more batch sizes and the compiled models. dry runs every step on the CPU at a tiny size.
# The package is built from this checkout and installed beside it: run from the checkout, `python -m` would take
# meansparse_fx/ here for the package, which lacks the kernels. Missing packages are taken from WHEELS, a folder, or PyPI.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:-python3}") || exit 1
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") # not resolved: a venv's python is a link
part=${2:-first}
budget=${BUDGET:-480}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=${RESULTS:-$root/benchmarks/results}
missing=$("$python" -c '
from importlib.util import find_spec
names = {"pyautoattack": "pyautoattack", "safetensors": "safetensors", "rich": "rich", "typer": "typer", "jinja2": "jinja2",
         "matplotlib": "matplotlib", "pytest": "pytest", "hypothesis": "hypothesis", "setuptools": "setuptools"}
print(*(package for name, package in names.items() if find_spec(name) is None))')
pip() { "$python" -m pip install -q --disable-pip-version-check --no-warn-script-location --target "$work/site" "$@"; }
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    pip --no-deps ${WHEELS:+--no-index --find-links "$WHEELS"} $missing || echo "not installed: $missing"
fi
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
# Without a network, a setuptools before 77 cannot build it: then the same files are laid out by hand.
if ! pip --no-deps --no-build-isolation --no-index "$root" 2>/dev/null; then
    mkdir -p "$work/site/meansparse_fx-0.dist-info" || exit 1
    cp -r "$root/meansparse_fx" "$work/site/" && cp -r "$root/kernels" "$work/site/meansparse_fx/kernels" || exit 1
    printf 'Metadata-Version: 2.1\nName: meansparse_fx\nVersion: 0\n' >"$work/site/meansparse_fx-0.dist-info/METADATA"
    printf '[torch_dynamo_backends]\nmeansparse = meansparse_fx.backend:meansparse\n' \
        >"$work/site/meansparse_fx-0.dist-info/entry_points.txt"
fi
ln -s "$root/benchmarks" "$root/tests" "$root/pyproject.toml" "$root/docs" "$root/README.md" "$work/"
cd "$work" || exit 1
MEANSPARSE_FX_COMMIT=${MEANSPARSE_FX_COMMIT:-$(git -C "$root" describe --always --dirty '--exclude=*' --abbrev=7 2>/dev/null)}
export MEANSPARSE_FX_COMMIT
cpu=
name='import torch; print(torch.cuda.get_device_name().replace(" ", "-"))'
if [ "$part" = dry ]; then
    cpu=1 name='print("cpu-dry")' results=${RESULTS:-$work/results} # not among those that pages are made from
    export MEANSPARSE_FX_LOWERING=eager # compiling for the CPU would take most of the time
fi
device=$("$python" -c "$name") || exit 1
failed=0
# One step of at most so many seconds; the next ones are run whatever becomes of it, as long as there is time.
run() {
    local seconds=$1
    shift
    local left=$((budget - SECONDS))
    if [ $left -lt 20 ]; then
        echo "== left out, $budget s are over: $*"
        return
    fi
    echo "== $SECONDS s: $*"
    timeout --signal=INT $((seconds < left ? seconds : left)) "$python" -m "$@" || { failed=1; echo "== failed or stopped: $*"; }
}
cuda() { run "$1" "benchmarks.$2" --device cuda --out "$results/${2}-$device.csv" "${@:3}"; }
tests() { run "$1" pytest -q -p no:cacheprovider "${@:2}"; }
models() { cuda "$1" models --repetitions 11 "${@:2}"; }

case $part in
first)
    tests 100 tests/kernels/test_gpu.py -m "gpu and not slow"
    cuda 30 host
    cuda 90 kernels --activation relu gelu --mode forward backward moments moments+activation --repetitions 5
    models 40 --eager --model WRN-16-4 --batch 1 8 64 256
    models 40 --eager --model ResNet-50 --batch 1 64
    models 40 --eager --model ConvNeXt-T Swin-T --batch 8 64 --dtype float32 bfloat16
    models 20 --eager --model WRN-28-10 --batch 8 64
    models 30 --eager --model WRN-70-16 Swin-L --batch 8 --mode forward
    models 25 --eager --model WRN-16-4 ResNet-50 --batch 64 --dtype bfloat16
    models 15 --eager --model ResNet-50 --batch 64 --channels-last
    cuda 60 attack --images 64 --pool 160 --steps 10 --queries 100 --repetitions 3 --compile reduce-overhead
    cuda 30 calibration
    models 90 --model WRN-16-4 --batch 8 --mode forward
    cuda 40 scaling --batches 2 --repetitions 3
    tests 60 tests/kernels -m "not gpu and not slow"
    ;;
rest)
    budget=${BUDGET:-3600}
    tests 300 tests/kernels/test_gpu.py -m "gpu and slow"
    cuda 600 kernels --compiled
    models 900 --model WRN-16-4 WRN-28-10 ResNet-50 ConvNeXt-T Swin-T --batch 64
    models 900 --eager --model WRN-28-10 ResNet-50 ConvNeXt-T Swin-T --batch 1 8 64 256 --dtype float32 bfloat16
    models 300 --cold --model WRN-16-4 ResNet-50 --batch 1 --mode forward
    models 300 --eager --model WRN-16-4 ResNet-50 --batch 64 --channels-last --dtype float32 bfloat16
    cuda 300 calibration --compiled
    ;;
dry)
    cuda() { run 600 "benchmarks.$1" --device cpu --out "$results/${1}-$device.csv" "${@:2}"; }
    TRITON_INTERPRET=1 tests 300 tests/kernels/test_gpu.py -k replayed
    cuda host --repetitions 3
    cuda kernels --activation relu --mode forward moments moments+activation --shape 2x4x4x4 2x3x4 --dtype bfloat16 --repetitions 2
    cuda models --eager --model WRN-10-1 --batch 1 --mode forward --repetitions 2
    cuda attack --model WRN-10-1 --images 2 --pool 8 --steps 2 --queries 2 --repetitions 1
    cuda calibration --repetitions 1 --case bundled --images 256
    cuda scaling --depth 10 16 --images 2 --channels 2 --plan WRN-10-1 --batch 2 --repetitions 1
    ;;
*)
    echo "no part $part: first, rest or dry" >&2
    exit 2
    ;;
esac
pages=$root
if [ -n "$cpu" ]; then
    pages=$work/pages
    mkdir -p "$pages/docs"
    cp "$root/README.md" "$pages/" && cp "$root"/docs/*.md "$pages/docs/"
fi
"$python" -m benchmarks.page --results "$results" --root "$pages" --summary || failed=1
exit $failed
