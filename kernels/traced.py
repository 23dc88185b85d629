"""The lowering for compilers: a composition whose forward and backward suit AOTAutograd's partitioner.

The partitioner decides what is kept for backward. Left to autograd, `reference.mean_sparse` makes it keep boolean
masks beside x: a comparison of two tensors counts as a reduction there (its output has a quarter of the bytes and
less), and reductions are never computed again. Masks are dear: on a CPU with AVX2, Inductor takes 20 ns to store one
boolean and 5 ns to load it, where computing it again from x takes less than 1 ns.

So what follows compares with numbers only, and the gradient of an activation that clips is told from its result,
which the next convolution keeps anyway. Then nothing is kept that the base model does not keep.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import ACTIVATIONS, per_channel, widened


def tells(activation: str, variant: str, backward: str) -> bool:
    """Return whether the gradient can be told from the result y as well as from x.

    Where the activation clips and the band becomes its centre: y is x outside the band where the slope is one;
    elsewhere y is the clipped centre or a bound of the activation. All these lie where `gradient` finds zero, in
    the exact mode, and give the slope at the centre, in the identity mode. No rounding: if any x is within the
    threshold of the centre, then the centre's nearest neighbour in the dtype of x is.
    """
    return ACTIVATIONS[activation].clips and variant == "mean" and backward in ("exact", "identity")


def _wide(x: Tensor, channel_dim: int, *vectors: Tensor | None) -> list[Any]:
    """Return x in its computing dtype, and the per-channel vectors in that dtype, shaped to broadcast."""
    wide = widened(x)
    return [wide, *(None if v is None else per_channel(v.to(wide.dtype), x.dim(), channel_dim) for v in vectors)]


def _sparsify(x: Tensor, centre: Tensor, threshold: Tensor, variant: str, steepness: float) -> tuple[Tensor, Tensor]:
    """Return s(x) and the mask of the band; centre and threshold broadcast."""
    # a - b <= 0 is a <= b, exactly: a difference of floats is rounded to zero only if they are equal.
    inside = (x - centre).abs() - threshold <= 0
    if variant == "smooth":
        return reference.smooth_gate(x, centre, threshold, steepness), inside
    snapped = torch.where(x < centre, centre - threshold, centre + threshold) if variant == "edge" else centre
    return torch.where(inside, snapped, x), inside


def gradient(
    grad: Tensor,
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    weight: Tensor | None,
    channel_dim: int,
    activation: str,
    constants: Sequence[float],
    variant: str,
    backward: str,
    steepness: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the weight (None without one); arguments as in `reference.mean_sparse`.

    Where `tells` says so, x is the result.
    """
    wide, centre, threshold, slope = _wide(x, channel_dim, centre, threshold, weight)
    grad = grad.to(wide.dtype)
    row = ACTIVATIONS[activation]
    s, inside = _sparsify(wide, centre, threshold, variant, steepness)
    gate = "smooth" if backward == "exact" and variant == "smooth" else backward
    if tells(activation, variant, backward):
        live = torch.where(inside, 0.0, wide) if gate == "exact" else wide
        grad_x = row.backward(grad, live, slope, *constants)
    elif gate == "exact":  # x in the place of s: they differ where the gradient is zero
        grad_x = row.backward(torch.where(inside, 0.0, grad), wide, slope, *constants)
    else:
        grad_x = row.backward(grad, s, slope, *constants)
        if gate == "smooth":
            grad_x = grad_x * reference.smooth_gate_derivative(wide, centre, threshold, steepness)
    if weight is None:
        return grad_x.to(x.dtype), None
    kept = [channel_dim] if weight.numel() > 1 else []
    per_element = row.weight_backward(grad, s, slope, *constants)
    grad_weight = per_element.sum([d for d in range(x.dim()) if d not in kept])
    return grad_x.to(x.dtype), grad_weight.view(weight.shape).to(weight.dtype)


class _MeanSparse(torch.autograd.Function):
    """The composition, with `gradient` for its backward."""

    @staticmethod
    def forward(x, centre, threshold, weight, channel_dim, activation, constants, variant, backward, steepness):
        wide, centre, threshold, slope = _wide(x, channel_dim, centre, threshold, weight)
        s, _ = _sparsify(wide, centre, threshold, variant, steepness)
        return ACTIVATIONS[activation].forward(s, slope, *constants).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *vectors = inputs[:4]
        ctx.options = _, activation, _, variant, backward, _ = inputs[4:]
        ctx.save_for_backward(output if tells(activation, variant, backward) else x, *vectors)

    @staticmethod
    def backward(ctx, grad):
        x, centre, threshold, weight = ctx.saved_tensors
        grad_x, grad_weight = gradient(grad, x, centre, threshold, weight, *ctx.options)
        return grad_x, None, None, grad_weight, None, None, None, None, None, None


def mean_sparse(
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    channel_dim: int,
    activation: str = "identity",
    constants: Sequence[float] = (),
    weight: Tensor | None = None,
    variant: str = "mean",
    backward: str = "exact",
    steepness: float = 10.0,
) -> Tensor:
    """Return act(s(x)) as aten operators; arguments, shapes and semantics as in `reference.mean_sparse`."""
    # Exported programs hold no autograd.Function. Before torch 2.14 Dynamo answers True under torch.compile, too, and
    # must: with dynamic sizes its autograd.Function gives wrong gradients there. What it costs is the stored mask.
    if torch.compiler.is_exporting():
        return reference.mean_sparse(
            x, centre, threshold, channel_dim, activation, constants, weight, variant, backward, steepness
        )
    # Read the numbers here. With dynamic=True they are symbols that Dynamo makes where one is first used: in torch 2.14
    # that would be inside the backward of one call, out of reach of the next call's.
    constants, steepness = tuple(map(float, constants)), float(steepness)
    return _MeanSparse.apply(
        x, centre, threshold, weight, channel_dim, activation, constants, variant, backward, steepness
    )
