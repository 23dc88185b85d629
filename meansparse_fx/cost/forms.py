"""Floor 5: what stands at a site, in every form that is compared: what it computes, on tensors without data.

`published` and `branch_free` are the operator as others write it; the benchmarks time the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ActivationCall
from ..frozen import fused_parts
from ..kernels.operator import Operator
from ..kernels.records import Options, Vectors
from ..kernels.reference import ACTIVATIONS, parameters, per_channel


def published(x: Tensor, mean: Tensor, variance: Tensor, alpha: Tensor, channel_dim: int) -> Tensor:
    """Return s(x) as published checkpoints compute it: a Python branch on a tensor, a deviation every time.

    Args:
        x: ``[..., C, ...]``.
        mean, variance: ``[C]``.
        alpha: ``[]``; the band is open.
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

    Attributes:
        shape, dtype: Of x, and of all the others.
        channel_dim: Dimension of x that holds the channels.
        activation: None for a bare operator.
        input_norm, sum_norm: There is a norm of x; of the sum.
        layer_scale: There is a LayerScale.
        residual, shortcut: There is a sum before the operator; after it.
        want_sum: Others read v, too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channel_dim: int
    activation: ActivationCall | None
    input_norm: bool
    layer_scale: bool
    residual: bool
    sum_norm: bool
    shortcut: bool
    want_sum: bool

    def inputs(self) -> list[Tensor]:
        """Return x, the residual if there is one and the shortcut if there is one: without data, wanting gradients."""
        count = 1 + self.residual + self.shortcut
        return [torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True) for _ in range(count)]

    def vector(self) -> Tensor:
        """Return one value a channel, ``[C]``, without data."""
        return torch.empty(self.shape[self.channel_dim], device="meta")

    def taken_in(self) -> str:
        """Return in words what is taken in."""
        return fused_parts(
            self.input_norm, self.layer_scale, self.residual, self.sum_norm, self.shortcut, self.want_sum
        )


Results = tuple[Tensor, ...]  # y, and v where others read it
Form = Callable[[Region, list[Tensor]], Results]


def _before(region: Region, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return v and u, as torch computes them call by call."""
    v = _normed(inputs[0], region) if region.input_norm else inputs[0]
    v = v * per_channel(region.vector(), v.dim(), region.channel_dim) if region.layer_scale else v
    v = v + inputs[1] if region.residual else v
    return v, _normed(v, region) if region.sum_norm else v


def _after(y: Tensor, region: Region, inputs: list[Tensor]) -> Tensor:
    return y + inputs[-1] if region.shortcut else y


def _normed(x: Tensor, region: Region) -> Tensor:
    mean, variance, weight, bias = (region.vector() for _ in range(4))
    return F.batch_norm(x, mean, variance, weight, bias, training=False, momentum=0.0, eps=1e-5)


def _slope(region: Region) -> Tensor | None:
    return region.vector() if region.activation and region.activation.weight is not None else None


def _activated(s: Tensor, region: Region, fresh: bool) -> Tensor:
    """Return the activation of s as the model calls it: in place only where it does so, and on a tensor that allows it.

    Args:
        fresh: s is no input of the region.
    """
    call = region.activation
    if call is None:
        return s
    row = ACTIVATIONS[call.name]
    slope = _slope(region)
    slope = None if slope is None else per_channel(slope, s.dim(), region.channel_dim)
    form = row.overwrite if call.inplace and fresh and row.overwrite else row.forward
    return form(s, *parameters(slope, call.constants))


def _with(operator: Callable[[Tensor, Region], Tensor]) -> Form:
    """Return the form that is torch's own calls with a form of the operator among them."""

    def form(region: Region, inputs: list[Tensor]) -> Results:
        v, u = _before(region, inputs)
        s = operator(u, region)
        y = _after(_activated(s, region, s is not inputs[0]), region, inputs)
        return (y, v) if region.want_sum else (y,)

    return form


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


def _ours(region: Region, inputs: list[Tensor]) -> Results:
    v, u = _before(region, inputs)
    operator = Operator(Vectors(region.vector(), region.vector(), _slope(region)), _options(region, False))
    y = _after(_OneCall.apply(operator, u, None, None), region, inputs)
    return (y, v) if region.want_sum else (y,)


def _fused(region: Region, inputs: list[Tensor]) -> Results:
    input_norm, sum_norm = (
        (region.vector(), region.vector()) if there else (None, None) for there in (region.input_norm, region.sum_norm)
    )
    scale = region.vector() if region.layer_scale else None
    vectors = Vectors(region.vector(), region.vector(), _slope(region), *input_norm, scale, *sum_norm)
    residual, shortcut = inputs[1] if region.residual else None, inputs[-1] if region.shortcut else None
    results = _OneCall.apply(Operator(vectors, _options(region, region.want_sum)), inputs[0], residual, shortcut)
    return results if isinstance(results, tuple) else (results,)


def _options(region: Region, want_sum: bool) -> Options:
    call = region.activation
    name, constants = (call.name, call.constants) if call else ("identity", ())
    return Options(region.channel_dim, name, constants, want_sum=want_sum)


FORMS: dict[str, Form] = {
    "base": _with(lambda u, region: u),
    # The branch asks for the value of alpha: a number with data, which is no tensor of the model's size.
    "published": _with(lambda u, r: published(u, r.vector(), r.vector(), torch.tensor(0.25), r.channel_dim)),
    "branch-free": _with(lambda u, r: branch_free(u, r.vector(), r.vector(), r.channel_dim)),
    "ours": _ours,
    "ours, fused": _fused,
}
