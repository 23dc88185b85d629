"""Time the operator by itself, beside a copy of the same tensor and every other way to compute it.

    python -m benchmarks.kernels [--device cuda] [--out benchmarks/results/kernels-cpu-1-thread.csv]

Contenders: a clone (what the memory allows), torch's own activation (the base model's cost), this package's operator,
the same expression in torch operators, and the published module's form, all in the tensor's dtype; with --compiled the
operator as torch.compile sees it. Moments stand beside torch.var_mean. On a GPU the tensors are those of real models,
larger than its cache, and a share of the clone's bandwidth is by time on the device alone.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meansparse_fx.kernels import ops

from .contenders import Form
from .harness import Make, Row, measure, on_gpu, options, run

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
LAYOUTS = ("contiguous_format", "channels_last", "tokens")
SHAPES = {
    "cpu": ("8x160x32x32", "128x16x28x28"),
    # Channels last of what has three dimensions: a ViT's, a Swin's and a ConvNeXt's tokens.
    "cuda": (
        "64x64x112x112", "64x192x56x56", "64x256x56x56", "256x160x32x32", "64x512x28x28", "256x320x16x16",
        "256x1024x14x14", "512x640x8x8", "256x2048x7x7", "64x197x3072", "64x3136x384", "64x784x768",
    ),
}  # fmt: skip
# What is timed, and how many tensors it must read and write at least; a clone's are two.
STREAMS = {"forward": 2, "backward": 3, "forward+backward": 5, "moments": 1, "moments+activation": 2}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # rounding of exp and erf; one rounding of the result
WRONG = 0.02  # share of elements that a rival in bfloat16 may have on the other side of the band's edge


def tensor(shape: str, layout: str, dtype: torch.dtype, device: str) -> tuple[Tensor, int]:
    """Return a tensor and its dimension of channels."""
    x = torch.randn([int(n) for n in shape.split("x")], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    if layout == "tokens":
        return x, x.dim() - 1
    return x.contiguous(memory_format=getattr(torch, layout)), 1


def contenders(x: Tensor, dim: int, name: str, mode: str, compiled: bool) -> dict[str, Make]:
    """Return what makes the calls to time, each checked against the same in float32 first."""
    if mode.startswith("moments"):
        return _moments(x, dim, name, mode)
    torch.compiler.reset()  # each case is compiled afresh; at its recompilation limit torch.compile would run eagerly
    generator = torch.Generator().manual_seed(0)
    centre = (torch.randn(x.shape[dim], generator=generator) * 0.1).to(x.device)
    std, alpha, act = torch.ones_like(centre), 0.25, ACTIVATIONS[name]
    published, in_dtype = (Form(form, centre, std, alpha, dim).to(x.dtype) for form in ("published", "branch-free"))
    branch_free = Form("branch-free", centre, std, alpha, dim)

    def own(x: Tensor) -> Tensor:
        return ops.mean_sparse(x, centre, alpha * std, dim, name)

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "torch activation": act,
        "meansparse_fx": own,
        "torch operators": lambda x: act(in_dtype(x)),
        "published form": lambda x: act(published(x)),
    }
    if compiled:
        forms["meansparse_fx, compiled"] = torch.compile(own)
    upstream = torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))  # in the layout of x, as in a model
    makes = {label: partial(call_of, form, x, upstream, mode) for label, form in forms.items()}
    expected = call_of(lambda x: act(branch_free(x)), x.float(), upstream.float(), mode)()
    tolerance = TOLERANCE[x.dtype]
    for label, make in makes.items():
        if label == "torch activation":
            continue
        found = make()()
        if found.dtype != x.dtype:
            raise AssertionError(f"{label}: {found.dtype} of {x.dtype}")
        close = torch.isclose(found.float(), expected, rtol=tolerance, atol=tolerance)
        wrong = 1 - float(close.double().mean())
        allowed = 0.0 if label.startswith("meansparse_fx") or x.dtype == torch.float32 else WRONG
        if not wrong <= allowed:
            raise AssertionError(f"{label}, {name} {mode}: {wrong:.2%} of the elements are wrong")
    return {"clone": lambda: x.clone} | makes


def call_of(form: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor, mode: str) -> Callable[[], Tensor]:
    """Return the call of a form on a tensor of its own, equal to x: for its result, or for x's gradient."""
    leaf = x.clone().requires_grad_(mode != "forward")
    if mode == "forward":
        return lambda: form(leaf)
    if mode == "forward+backward":
        return lambda: torch.autograd.grad(form(leaf), leaf, upstream)[0]
    y = form(leaf)
    return lambda: torch.autograd.grad(y, leaf, upstream, retain_graph=True)[0]


def _moments(x: Tensor, dim: int, name: str, mode: str) -> dict[str, Make]:
    others = [d for d in range(x.dim()) if d != dim]
    calls: dict[str, Callable[[], Any]] = {
        "clone": x.clone,
        "torch.var_mean": lambda: torch.var_mean(x, others),
        "meansparse_fx": lambda: ops.channel_moments(x, dim),
    }
    if mode == "moments+activation":
        tolerance = TOLERANCE[x.dtype]
        y, _ = ops.activation_moments(x, dim, name)
        torch.testing.assert_close(y, ACTIVATIONS[name](x), rtol=tolerance, atol=tolerance)
        calls["meansparse_fx"] = lambda: ops.activation_moments(x, dim, name)[1]
        calls["torch activation"] = lambda: ACTIVATIONS[name](x)
    count, mean, m2 = calls["meansparse_fx"]()
    variance, expected = torch.var_mean(x.double(), others, correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(m2.double() / count, variance, rtol=1e-4, atol=1e-4)
    return {label: (lambda call=call: call) for label, call in calls.items()}


def with_bandwidth(rows: list[Row], mode: str) -> list[Row]:
    """Return the rows of one case with each one's share of the clone's bandwidth, by device time if there is one."""
    clone = next(row for row in rows if row.contender == "clone")
    time = "device_ms" if clone.device_ms else "milliseconds"
    streams = {row.contender: STREAMS[mode] for row in rows} | {"clone": 2, "torch.var_mean": STREAMS["moments"]}
    return [
        row.but(of_clone=streams[row.contender] / 2 * clone[time] / row[time]) if row.get(time) else row for row in rows
    ]


def rows_of(case: str, device: str, repetitions: int, compiled: bool) -> list[Row]:
    """Return the rows of a case, its words in the order of the CSV: shape, dtype, layout, activation, mode."""
    shape, dtype, layout, name, mode = case.split()
    x, dim = tensor(shape, layout, getattr(torch, dtype), device)
    makes = contenders(x, dim, name, mode, compiled)
    baseline = "torch.var_mean" if mode.startswith("moments") else "torch activation"
    more = on_gpu(makes, baseline) if device == "cuda" else None
    calls = {label: make() for label, make in makes.items()}
    return with_bandwidth(measure("kernels", case, calls, baseline, device, repetitions, more=more), mode)


def main() -> None:
    parser = options(__doc__, repetitions=21)
    parser.add_argument("--shape", nargs="+", help="such as 64x256x56x56; by default the device's")
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--mode", nargs="+", choices=STREAMS, default=list(STREAMS)[:3])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--compiled", action="store_true", help="the operator as torch.compile sees it, too")
    args = parser.parse_args()
    dtypes = args.dtype or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    axes = (args.shape or SHAPES[args.device], dtypes, LAYOUTS, args.activation, args.mode)
    cases = [
        f"{shape} {dtype} {layout} {name} {mode}"
        for shape, dtype, layout, name, mode in itertools.product(*axes)
        if (layout == "tokens") == (shape.count("x") == 2)
        and not (mode == "moments" and name != args.activation[0])  # which has none
    ]
    run({case: partial(rows_of, case, args.device, args.repetitions, args.compiled) for case in cases}, args.out)


if __name__ == "__main__":
    main()
