"""The lowering for eager tensors without a compiled kernel: torch operators, as few buffers as exactness allows.

On a CPU every fresh large buffer costs its page faults, so the band test and the activation work in place of
one scratch tensor. Runs below autograd, on inputs it must not change.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .records import Options, Vectors
from .reference import ACTIVATIONS, inside_band, per_channel, smooth_gate, smooth_gate_derivative, widened


def _shaped(vector: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """Return a per-channel vector that broadcasts against ``like``, in its dtype."""
    if vector.dtype != like.dtype:
        vector = vector.to(like.dtype)
    return per_channel(vector, like.dim(), channel_dim)


def _sparsify(x: Tensor, centre: Tensor, threshold: Tensor, variant: str, steepness: float) -> tuple[Tensor, Tensor]:
    """Return s(x) in a fresh tensor, and the mask of the band."""
    if variant == "smooth":
        return smooth_gate(x, centre, threshold, steepness), inside_band(x, centre, threshold)
    scratch = x - centre
    inside = scratch.abs_() <= threshold
    if variant == "edge":
        centre = torch.where(x < centre, centre - threshold, centre + threshold)
    return torch.where(inside, centre, x, out=scratch), inside


def forward(x: Tensor, vectors: Vectors, options: Options) -> Tensor:
    """Return act(s(x)) in the dtype and memory format of x; of the vectors, the band and the weight count."""
    centre, threshold, weight, *_ = vectors
    channel_dim, activation, constants, variant, _, steepness, _ = options
    wide = widened(x)
    centre, threshold = _shaped(centre, wide, channel_dim), _shaped(threshold, wide, channel_dim)
    slope = None if weight is None else _shaped(weight, wide, channel_dim)
    s, _ = _sparsify(wide, centre, threshold, variant, steepness)
    row = ACTIVATIONS[activation]
    y = (row.overwrite or row.forward)(s, slope, *constants)
    return y if wide is x else y.to(x.dtype)


def backward(grad: Tensor, x: Tensor, vectors: Vectors, options: Options) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight (empty without one), recomputing s(x) from x."""
    centre, threshold, weight, *_ = vectors
    channel_dim, activation, constants, variant, backward, steepness, _ = options
    wide, grad = widened(x), widened(grad)
    centre, threshold = _shaped(centre, wide, channel_dim), _shaped(threshold, wide, channel_dim)
    slope = None if weight is None else _shaped(weight, wide, channel_dim)
    row = ACTIVATIONS[activation]
    if backward == "exact" and variant != "smooth" and weight is None:
        scratch = wide - centre
        inside = scratch.abs_() <= threshold
        masked = torch.where(inside, grad.new_zeros(()), grad, out=scratch)
        # x in the place of s: they differ where the gradient is zero.
        return row.backward(masked, wide, slope, *constants).to(x.dtype), x.new_empty(0)
    s, inside = (wide, None) if variant == "none" else _sparsify(wide, centre, threshold, variant, steepness)
    grad_s = row.backward(grad, s, slope, *constants)
    if backward == "smooth" or (backward == "exact" and variant == "smooth"):
        grad_x = grad_s * smooth_gate_derivative(wide, centre, threshold, steepness)
    elif backward == "exact":
        grad_x = grad_s.masked_fill(inside, 0) if grad_s is grad else grad_s.masked_fill_(inside, 0)
    else:
        grad_x = grad_s.clone() if grad_s is grad else grad_s
    if weight is None:
        return grad_x.to(x.dtype), x.new_empty(0)
    per_element = row.weight_backward(grad, s, slope, *constants)
    kept = [channel_dim] if weight.numel() > 1 else []
    grad_weight = per_element.sum([d for d in range(x.dim()) if d not in kept])
    return grad_x.to(x.dtype), grad_weight.view(weight.shape).to(weight.dtype)
