"""Floor 5: what stands at a site, in every form that is compared: what it computes, on tensors without data.

`published` and `branch_free` are the operator as others write it; the benchmarks time the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operator import Operator
from ..kernels.records import Options, Vectors
from ..kernels.reference import ACTIVATIONS, parameters, per_channel


def published(x: Tensor, mean: Tensor, variance: Tensor, alpha: Tensor, channel_dim: int) -> Tensor:
    """Return s(x) of ``[..., C, ...]`` as published checkpoints compute it: a Python branch, a root every time.

    Mean and variance are ``[C]``, alpha ``[]``; the band is open.
    """
    if alpha == 0:
        return x
    mean = per_channel(mean, x.dim(), channel_dim)
    band = alpha * torch.sqrt(per_channel(variance, x.dim(), channel_dim))
    return torch.where((x - mean).abs() < band, mean, x)


def branch_free(x: Tensor, mean: Tensor, band: Tensor, channel_dim: int) -> Tensor:
    """Return s(x) without the branch, the band ``[C]`` computed beforehand: what a careful reader would write."""
    mean = per_channel(mean, x.dim(), channel_dim)
    return torch.where((x - mean).abs() <= per_channel(band, x.dim(), channel_dim), mean, x)


@dataclass(frozen=True, slots=True)
class Region:
    """A site and what `fuse` takes in around it.

    y = act(s(u)) + shortcut,   u = sum_norm(v),   v = input_norm(x) * layer_scale + residual
    """

    shape: tuple[int, ...]  # of x, and of all the others
    dtype: torch.dtype
    vectors: Vectors  # of the fused operator, without data
    options: Options
    residual: bool  # there is a sum before the operator
    shortcut: bool  # and after it
    inplace: bool  # the model's activation overwrites its input

    def inputs(self) -> list[Tensor]:
        """Return x, the residual if there is one and the shortcut if there is one: without data, wanting gradients."""
        count = 1 + self.residual + self.shortcut
        return [torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True) for _ in range(count)]


Results = tuple[Tensor, ...]  # y, and v where others read it
Form = Callable[[Region, list[Tensor]], Results]


def _unfused(operator: Callable[[Tensor, Region], Tensor], activates: bool = False) -> Form:
    """Return the form that is torch's own calls with a form of the operator, or of operator and activation, in it."""

    def form(region: Region, inputs: list[Tensor]) -> Results:
        vectors, options = region.vectors, region.options
        v = inputs[0] if not vectors.has_input_norm else _normed(inputs[0], vectors.input_mean)
        if vectors.layer_scale is not None:
            v = v * per_channel(vectors.layer_scale, v.dim(), options.channel_dim)
        v = v + inputs[1] if region.residual else v
        y = operator(v if not vectors.has_sum_norm else _normed(v, vectors.sum_mean), region)
        if not activates:
            y = _activated(y, region, y is not inputs[0])
        y = y + inputs[-1] if region.shortcut else y
        return (y, v) if options.want_sum else (y,)

    return form


def _normed(x: Tensor, vector: Tensor) -> Tensor:
    return F.batch_norm(x, vector, vector, vector, vector, training=False, momentum=0.0, eps=1e-5)


def _activated(s: Tensor, region: Region, fresh: bool) -> Tensor:
    """Return the activation as the model calls it: in place only where it does so, and s is no input of the region."""
    options, weight = region.options, region.vectors.weight
    if options.activation == "identity":
        return s
    row = ACTIVATIONS[options.activation]
    slope = None if weight is None else per_channel(weight, s.dim(), options.channel_dim)
    form = row.overwrite if region.inplace and fresh and row.overwrite else row.forward
    return form(s, *parameters(slope, options.constants))


_library = torch.library.Library("meansparse_fx_cost", "DEF")
_library.define("call(Tensor[] reads, int writes) -> Tensor[]")
_library.impl("call", lambda reads, writes: [torch.empty_like(reads[0]) for _ in range(writes)], "Meta")


class _OneCall(torch.autograd.Function):
    """The operator as the kernels compute it, one call in each direction; nothing is computed.

    What is kept for backward is what `Operator` says.
    """

    @staticmethod
    def forward(ctx, operator, x, residual, shortcut):
        inputs = [t for t in (x, residual, shortcut) if t is not None]
        y, *v = torch.ops.meansparse_fx_cost.call(inputs, 2 if operator.options.want_sum else 1)
        source = operator.kept_for_backward(x.dtype, residual is not None, shortcut is not None)
        kept = {"input": inputs[: 1 + (residual is not None)], "sum": v, "result": [y]}[source]
        ctx.operator = operator
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return (y, *v) if v else y

    @staticmethod
    def backward(ctx, *grads):
        _, _, has_residual, has_shortcut = ctx.needs_input_grad
        reads = [*ctx.saved_tensors, *[g for g in grads if g is not None]]
        found = torch.ops.meansparse_fx_cost.call(reads, 2 if has_residual and ctx.operator.vectors.scaled else 1)
        return None, found[0], found[-1] if has_residual else None, grads[0] if has_shortcut else None


def _ours(u: Tensor, region: Region) -> Tensor:
    vectors = Vectors(*region.vectors[:3])  # without what is around
    return _OneCall.apply(Operator(vectors, region.options._replace(want_sum=False)), u, None, None)


def _fused(region: Region, inputs: list[Tensor]) -> Results:
    residual, shortcut = inputs[1] if region.residual else None, inputs[-1] if region.shortcut else None
    results = _OneCall.apply(Operator(region.vectors, region.options), inputs[0], residual, shortcut)
    return results if isinstance(results, tuple) else (results,)


def _published(u: Tensor, region: Region) -> Tensor:
    # The branch asks for the value of alpha: a number with data, which is no tensor of the model's size.
    vector = region.vectors.centre
    return published(u, vector, vector, torch.tensor(0.25), region.options.channel_dim)


FORMS: dict[str, Form] = {
    "base": _unfused(lambda u, region: u),
    "published": _unfused(_published),
    "branch-free": _unfused(lambda u, r: branch_free(u, r.vectors.centre, r.vectors.threshold, r.options.channel_dim)),
    "ours": _unfused(_ours, activates=True),
    "ours, fused": _fused,
}
