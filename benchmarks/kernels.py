"""Time the operator by itself, beside a copy of the same tensor and every other way to compute it.

    python -m benchmarks.kernels [--device cuda] [--out benchmarks/results/kernels-cpu.csv]

Contenders: a clone (what the memory allows), torch's own activation (the base model's cost), this package's
operator, by itself and as torch.compile sees it, the same expression in torch operators, and the published module's
form. On a GPU the tensors are larger than its cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from meansparse_fx.kernels import ops, reference

from .harness import Row, measure, report
from .rivals import PublishedForm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
SHAPES = {
    "cpu": {"8x160x32x32": (8, 160, 32, 32), "128x16x28x28": (128, 16, 28, 28)},
    "cuda": {"256x160x32x32": (256, 160, 32, 32), "64x256x56x56": (64, 256, 56, 56)},
}


# What is timed, and how many tensors it must read and write at least; a clone's are two.
STREAMS = {"forward": 2, "backward": 3, "forward+backward": 5}


def contenders(x: Tensor, name: str, mode: str) -> dict[str, Callable[[], object]]:
    """Return the calls to time, each checked against the reference first."""
    torch.compiler.reset()  # each case is compiled afresh; at its recompilation limit torch.compile would run eagerly
    g = torch.Generator().manual_seed(0)
    channels = x.shape[1]
    centre = (torch.randn(channels, generator=g) * 0.1).to(x.device)
    std, alpha = torch.ones(channels, device=x.device), 0.25
    threshold = alpha * std
    act, published = ACTIVATIONS[name], PublishedForm(centre, std, alpha)

    def branch_free(x: Tensor) -> Tensor:
        return reference.mean_sparse(x, centre, threshold, 1, name)

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "torch activation": act,
        "meansparse_fx": lambda x: ops.mean_sparse(x, centre, threshold, 1, name),
        "torch operators": branch_free,
        "meansparse_fx, compiled": torch.compile(lambda x: ops.mean_sparse(x, centre, threshold, 1, name)),
        "published form": lambda x: act(published(x)),
    }
    upstream = torch.empty_like(x).copy_(torch.randn(x.shape, generator=g))  # in the layout of x, as a network has it
    leaf = x.clone().requires_grad_(mode != "forward")

    def call_of(form: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        if mode == "forward":
            return lambda: form(leaf)
        if mode == "forward+backward":
            return lambda: torch.autograd.grad(form(leaf), leaf, upstream)[0]
        y = form(leaf)
        return lambda: torch.autograd.grad(y, leaf, upstream, retain_graph=True)[0]

    calls = {label: call_of(form) for label, form in forms.items()}
    expected = calls["torch operators"]()
    tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-5  # one rounding of bfloat16; of exp and erf in float32
    for label, call in calls.items():
        if label != "torch activation":
            torch.testing.assert_close(call(), expected, rtol=tolerance, atol=tolerance)
    return {"clone": lambda: x.clone()} | calls


def with_bandwidth(rows: list[Row], mode: str) -> list[Row]:
    """Return the rows of one case with each one's bandwidth as a share of the clone's."""
    clone = next(row.milliseconds for row in rows if row.contender == "clone")
    streams = {row.contender: 2 if row.contender == "clone" else STREAMS[mode] for row in rows}
    return [replace(row, of_clone=streams[row.contender] / 2 * clone / row.milliseconds) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", help="of the device's, by default all")
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--mode", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repetitions", type=int, default=21)
    args = parser.parse_args()
    dtypes = [torch.float32] + ([torch.bfloat16] if args.device == "cuda" else [])
    rows: list[Row] = []
    shapes = SHAPES[args.device]
    for label in args.shape or shapes:
        shape = shapes[label]
        for dtype in dtypes:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = (
                    torch.randn(shape, generator=torch.Generator().manual_seed(1))
                    .to(args.device, dtype)
                    .contiguous(memory_format=layout)
                )
                for name in args.activation:
                    for mode in args.mode:
                        words = (label, str(dtype).removeprefix("torch."), str(layout).removeprefix("torch."), name)
                        calls, case = contenders(x, name, mode), " ".join((*words, mode))
                        own = measure("kernels", case, calls, "torch activation", args.device, args.repetitions)
                        rows += with_bandwidth(own, mode)
    report(rows, args.out)


if __name__ == "__main__":
    main()
