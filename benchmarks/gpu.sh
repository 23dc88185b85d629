#!/usr/bin/env bash
# All that wants a GPU, in one go: the kernels' numerics as compiled code, then their speed, then whole models.
#   bash benchmarks/gpu.sh [PYTHON]     results go to benchmarks/results/, one file a device
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
"$python" -m pytest -q tests/kernels -m "not slow"
"$python" -m benchmarks.kernels --device cuda --out "benchmarks/results/kernels-$device.csv"
"$python" -m benchmarks.models --device cuda --batch 8 64 256 --out "benchmarks/results/models-$device.csv"
"$python" -m benchmarks.models --device cuda --batch 64 --channels-last --out "benchmarks/results/models-channels-last-$device.csv"
