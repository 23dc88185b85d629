"""What a call of the operator costs on the host: ``python -m benchmarks.host [--json] [--out FILE]``.

Microseconds of wall time a call, of many calls on a small tensor without a synchronisation, beside torch's own calls in
the same process: medians of short rounds in which all take turns, so that a busy machine seldom interrupts one. With a
GPU the kernels are launched there. Without one the launch is stubbed on CPU tensors: everything runs but the driver's
call, which is what a launch costs anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from meansparse_fx.activations import ActivationCall
from meansparse_fx.frozen import FrozenNorm, Prologue
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors
from meansparse_fx.nn import MeanSparse

from .harness import Row, provenance, write

SHAPE = (2, 64, 4, 4)


class Empty(torch.autograd.Function):
    """Keeps its input and computes nothing: what any operator with a gradient of its own costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


class _Stub:
    """Stands for a compiled kernel whose launch does nothing."""

    function, packed_metadata = 0, ()

    def run(self, *_: Any) -> None:
        """Take what a launch takes."""


def stubbed_launch() -> mock._patch_dict | Any:
    """Return a context in which a Triton launch does everything on the host but call the driver."""
    from meansparse_fx.kernels import triton_launch

    def first(self: Any, tensors: Any, aligned: bool, hooked: bool) -> None:
        stub = _Stub()
        self._run, self._function, self._metadata = stub.run, stub.function, stub.packed_metadata
        self._stream = lambda index: 0

    return mock.patch.object(triton_launch.Launch, "_first", first)


def calls(device: str, choice: str) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    x = torch.randn(SHAPE, device=device)
    leaf, upstream = x.clone().requires_grad_(), torch.ones_like(x)
    channels = SHAPE[1]
    zeros, ones = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    relu, gelu = (Operator(Vectors(zeros, ones), Options(1, name), choice) for name in ("relu", "gelu"))
    norm, conv = nn.BatchNorm2d(channels).to(device).eval(), nn.Conv2d(channels, channels, 3).to(device)
    norm.requires_grad_(False), conv.requires_grad_(False)
    module = MeanSparse("site", channels, 1, ActivationCall("relu")).to(device)
    fused = MeanSparse("fused", channels, 1, ActivationCall("relu")).to(device)
    fused.prologue = Prologue(FrozenNorm(norm, norm.eps))

    def gradient(form: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(leaf), leaf, upstream)

    return {
        "F.relu": lambda: F.relu(x),
        "F.gelu": lambda: F.gelu(x),
        "batch norm, eval": lambda: norm(x),
        "operator, ReLU": lambda: relu(x),
        "operator, GELU": lambda: gelu(x),
        "module, ReLU": lambda: module(x),
        "module, norm and ReLU": lambda: fused(x, None, True),
        "conv, batch norm, ReLU": lambda: F.relu(norm(conv(x))),
        "conv, batch norm, module": lambda: module(norm(conv(x))),
        "conv, fused module": lambda: fused(conv(x), None, True),
        "forward+backward: F.relu": gradient(F.relu),
        "forward+backward: empty Function": gradient(Empty.apply),
        "forward+backward: operator, ReLU": gradient(relu),
        "forward+backward: operator, GELU": gradient(gelu),
    }


def measure(found: dict[str, Callable[[], object]], rounds: int, number: int) -> dict[str, float]:
    """Return by name the median over rounds of the microseconds a call takes; in each round all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for call in found.values():
        for _ in range(10):
            call()
    for _ in range(rounds):
        for name, call in found.items():
            call(), call()  # others were in the caches
            start = time.perf_counter()
            for _ in range(number):
                call()
            seconds[name].append((time.perf_counter() - start) / number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return {name: 1e6 * statistics.median(own) for name, own in seconds.items()}


def run(rounds: int = 201, number: int = 20) -> dict[str, Any]:
    """Return the microseconds by call, and the ratios that are the targets."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        times = measure(calls(device, "triton"), rounds, number)
    else:
        with mock.patch.dict("os.environ", MEANSPARSE_FX_LOWERING="triton"), stubbed_launch():
            times = measure(calls(device, "triton"), rounds, number)
    backward = "forward+backward: "
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU: the launch is stubbed",
        "torch": torch.__version__,
        "microseconds": {name: round(value, 2) for name, value in times.items()},
        "forward_over_relu": round(times["operator, ReLU"] / times["F.relu"], 2),
        "module_over_relu": round(times["module, ReLU"] / times["F.relu"], 2),
        "forward_backward_over_relu": round(times[f"{backward}operator, ReLU"] / times[f"{backward}F.relu"], 3),
        "fused_over_base": round(times["conv, fused module"] / times["conv, batch norm, ReLU"], 2),
    }


def _case(name: str) -> tuple[str, str]:
    """Return case and contender of a row."""
    mode, colon, call = name.partition(": ")
    return (mode, call) if colon else ("forward", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--device", help="a GPU where there is one, else the stub")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = run(args.rounds)
    if args.out is not None:
        untimed = dict.fromkeys(("milliseconds", "low", "high", "ratio"))
        where = {"device": found["device"], "torch": found["torch"], "threads": 1, "repetitions": args.rounds}
        rows = [
            Row("host", *_case(name), baseline="", host_ms=us / 1e3, **untimed, **where, **provenance())
            for name, us in found["microseconds"].items()
        ]
        write(rows, args.out)
    if args.json:
        print(json.dumps(found))
        return
    table = Table("call", "microseconds", box=None, title=f"host, {found['device']}, torch {found['torch']}")
    for name, value in found["microseconds"].items():
        table.add_row(name, f"{value:.1f}")
    for name in ("forward_over_relu", "module_over_relu", "forward_backward_over_relu", "fused_over_base"):
        table.add_row(name.replace("_", " "), f"{found[name]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
