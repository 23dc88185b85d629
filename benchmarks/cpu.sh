#!/usr/bin/env bash
# The files of a CPU: two cores that do nothing else, about 40 minutes, most of it compiling.
#   bash benchmarks/cpu.sh [PYTHON]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
results=benchmarks/results
failed=0
export OMP_WAIT_POLICY=PASSIVE
# One step on so many threads; the next ones are run whatever becomes of it.
run() { export OMP_NUM_THREADS=$1; shift; echo "== $*"; "$python" -m "$@" || failed=1; }
models() { run 2 benchmarks.models --device cpu --out "$results/models-cpu-2-threads.csv" "$@"; }

models --model WRN-16-4 --batch 8 --repetitions 15 --cold                             # 6 minutes
models --model ResNet-50 --batch 4 --mode forward --repetitions 11                    # 4
models --model ConvNeXt-T --batch 4 --mode forward --repetitions 11                   # 3
models --model Swin-T --batch 4 --mode forward --repetitions 11                       # 11
models --eager --model ResNet-50 ConvNeXt-T Swin-T --batch 4 --mode "images' gradient" --repetitions 11         # 4
models --eager --model WRN-16-4 RaWRN-small --batch 1 --repetitions 21                # 1
run 2 benchmarks.attack --device cpu --images 16 --pool 40 --steps 10 --queries 100 --repetitions 3 \
    --out "$results/attack-cpu-2-threads.csv"                                         # 2
run 2 benchmarks.scaling --device cpu --batch 16 --repetitions 3 --out "$results/scaling-cpu-2-threads.csv"     # 2
run 1 benchmarks.calibration --device cpu --compiled --repetitions 5 \
    --out "$results/calibration-cpu-1-thread.csv"                                     # 3
run 1 benchmarks.kernels --device cpu --shape 8x160x32x32 --mode forward forward+backward --compiled \
    --out "$results/kernels-cpu-1-thread.csv"                                         # 1
run 1 benchmarks.page --count                                                         # 1
exit $failed
