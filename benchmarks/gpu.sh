#!/usr/bin/env bash
# All that wants a GPU: the kernels' numerics as compiled code, then every benchmark; at the end docs/performance.md.
#   bash benchmarks/gpu.sh [PYTHON] [first|rest]     results go to benchmarks/results/, one file a device
# first (the default) has rows of every kind; estimated, not yet measured, for an H100 with 16 CPU cores: 9 minutes, of
# which 4 are compiling. rest adds what takes longer: the other models compiled, the largest models, more batch sizes.
# Each benchmark writes its file as it goes, so that a run that is stopped keeps what it had.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
part=${2:-first}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
results=benchmarks/results
failed=0
# One step; the next ones are run whatever becomes of it.
run() { echo "== $*"; "$python" -m "$@" || failed=1; }
models() { run benchmarks.models --device cuda --append --repetitions 11 --out "$results/models-$device.csv" "$@"; }

case $part in
first)
    run pytest -q tests/kernels -m "not slow"                                                                    # 60 s
    run benchmarks.kernels --device cuda --activation relu gelu --mode forward backward \
        --shape 256x160x32x32 --out "$results/kernels-$device.csv"                                               # 70 s
    models --model WRN-16-4 --batch 64                                                                           # 80 s
    models --model ResNet-50 --batch 64 --mode forward                                                           # 70 s
    models --eager --model WRN-16-4 --batch 8 256                                                                # 20 s
    models --eager --model WRN-28-10 RaWRN-small --batch 64                                                      # 25 s
    models --eager --model ConvNeXt-T Swin-T --batch 64                                                          # 30 s
    models --eager --model ResNet-50 --batch 64 --mode "images' gradient"                                        # 10 s
    models --eager --model WRN-70-16 Swin-L --batch 8                                                            # 40 s
    models --eager --model WRN-16-4 ResNet-50 Swin-T --batch 64 --dtype bfloat16                                 # 35 s
    models --eager --model ResNet-50 --batch 64 --channels-last                                                  # 10 s
    run benchmarks.attack --device cuda --images 64 --pool 160 --steps 10 --queries 250 --repetitions 3 \
        --out "$results/attack-$device.csv"                                                                      # 60 s
    run benchmarks.calibration --device cuda --out "$results/calibration-$device.csv"                            # 20 s
    run benchmarks.scaling --device cuda --batches 2 --repetitions 3 --out "$results/scaling-$device.csv"        # 40 s
    ;;
rest)
    run benchmarks.kernels --device cuda --out "$results/kernels-$device.csv"
    models --model ConvNeXt-T Swin-T --batch 64
    models --model ResNet-50 --batch 64 --mode "images' gradient"
    models --model WRN-28-10 --batch 8 64 256 --mode forward "images' gradient" "all gradients"
    models --eager --model ResNet-50 ConvNeXt-T Swin-T --batch 1 8 256
    models --cold --model WRN-16-4 ResNet-50 --batch 1 --mode forward
    models --model WRN-16-4 ResNet-50 --batch 64 --dtype bfloat16
    models --model WRN-16-4 ResNet-50 --batch 64 --channels-last
    run benchmarks.calibration --device cuda --compiled --out "$results/calibration-$device.csv"
    ;;
*)
    echo "no part $part: first or rest" >&2
    exit 2
    ;;
esac
run benchmarks.performance
exit $failed
