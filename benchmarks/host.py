"""What a call of the operator costs on the host: ``python -m benchmarks.host [--out FILE]``.

Wall time a call, of many calls on a small tensor without a synchronisation, beside torch's own calls in the same
process: medians of short rounds in which all take turns, so that a busy machine seldom interrupts one. With a GPU the
kernels are launched there. Without one the launch is stubbed on CPU tensors: everything runs but the driver's call,
which is what a launch costs anywhere.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_fx.activations import ActivationCall
from meansparse_fx.frozen import FrozenNorm, Prologue
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors
from meansparse_fx.nn import MeanSparse

from .harness import Call, Row, environment, in_turns, options, ratio_of, run

SHAPE = (2, 64, 4, 4)
BACKWARD = "forward+backward: "


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


@contextmanager
def stubbed_launch() -> Iterator[None]:
    """Let a Triton launch on CPU tensors do everything on the host but call the driver."""
    from meansparse_fx.kernels import triton_launch

    def first(self: Any, tensors: Any, aligned: bool, hooked: bool) -> None:
        self._run, self._function, self._metadata = lambda *_: None, 0, ()
        self._stream = lambda index: 0

    lowering = mock.patch.dict("os.environ", MEANSPARSE_FX_LOWERING="triton")
    with lowering, mock.patch.object(triton_launch.Launch, "_first", first):
        yield


def calls(device: str) -> dict[str, Call]:
    """Return what is timed, by name."""
    x = torch.randn(SHAPE, device=device)
    leaf, upstream = x.clone().requires_grad_(), torch.ones_like(x)
    channels = SHAPE[1]
    zeros, ones = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    relu, gelu = (Operator(Vectors(zeros, ones), Options(1, name), "triton") for name in ("relu", "gelu"))
    norm = nn.BatchNorm2d(channels).to(device).eval().requires_grad_(False)
    conv = nn.Conv2d(channels, channels, 3).to(device).requires_grad_(False)
    module = MeanSparse("site", channels, 1, ActivationCall("relu")).to(device)
    fused = MeanSparse("fused", channels, 1, ActivationCall("relu")).to(device)
    fused.prologue = Prologue(FrozenNorm(norm))

    def gradient(form: Callable[[Tensor], Tensor]) -> Call:
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
        f"{BACKWARD}F.relu": gradient(F.relu),
        f"{BACKWARD}empty Function": gradient(Empty.apply),
        f"{BACKWARD}operator, ReLU": gradient(relu),
        f"{BACKWARD}operator, GELU": gradient(gelu),
    }


def timed(device: str, repetitions: int) -> list[Row]:
    """Return a row a call, its ratio to ReLU alone, or to convolution, norm and ReLU."""
    torch.set_num_threads(1)
    with nullcontext() if device == "cuda" else stubbed_launch():
        times = in_turns(calls(device), device, repetitions, warm_up=10, number=20)
    where = environment(device) | {"repetitions": repetitions}
    where |= {} if device == "cuda" else {"device": "no GPU: the launch is stubbed"}
    rows = []
    for name, own in times.items():
        mode, _, call = name.rpartition(": ")
        base = "conv, batch norm, ReLU" if call.startswith("conv") else "F.relu"
        row = Row(benchmark="host", case=mode or "forward", contender=call, baseline=base, **where)
        beside = times[f"{BACKWARD if mode else ''}{base}"]
        rows.append(row.but(ratio=ratio_of(own, beside), host_ms=statistics.median(own)))
    return rows


def main() -> None:
    args = options(__doc__, repetitions=201).parse_args()
    run({"host": lambda: timed(args.device, args.repetitions)}, args.out)


if __name__ == "__main__":
    main()
