"""The fused operator in torch operators; the CPU's compiled kernels are compiled from it, too.

Runs below autograd. Floor 0: torch and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager
from .records import Options, Vectors
from .reference import per_channel, widened


def _affine(v: Tensor, scale: Tensor | None, shift: Tensor | None, channel_dim: int) -> Tensor:
    scale, shift = (None if p is None else per_channel(p.to(v.dtype), v.dim(), channel_dim) for p in (scale, shift))
    if scale is not None and shift is not None:
        return torch.addcmul(shift, v, scale)
    return v if scale is None else v * scale


def _sum(x: Tensor, residual: Tensor | None, vectors: Vectors, channel_dim: int) -> Tensor:
    """Return v in the computing dtype."""
    v = _affine(widened(x), vectors.scale, vectors.shift, channel_dim)
    v = _affine(v, vectors.layer_scale, None, channel_dim)
    return v if residual is None else v + widened(residual)


def forward(
    x: Tensor, residual: Tensor | None, shortcut: Tensor | None, vectors: Vectors, options: Options
) -> tuple[Tensor, Tensor]:
    """Return y, and v (empty unless wanted), in the dtype and memory format of x."""
    dim, want_sum = options.channel_dim, options.want_sum
    v, rounded = _sum(x, residual, vectors, dim), x.new_empty(0)
    if want_sum:
        rounded = v.to(x.dtype)
        v = widened(rounded)  # y is the function of exactly what others see
    u = _affine(v, vectors.norm_scale, vectors.norm_shift, dim)
    y = eager.forward(u, vectors, options)
    if shortcut is not None:
        y += shortcut
    return y.to(x.dtype), rounded


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    vectors: Vectors,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the residual and of the weight, each empty where there is none.

    Args:
        grad: Of y.
        grad_sum: Of v, where that is a result that somebody read.
        x: As in `forward`; with ``want_sum`` the v that it returned.
        residual: As in `forward`; with ``want_sum`` only whether there is one counts.
    """
    dim, want_sum = options.channel_dim, options.want_sum
    v = widened(x) if want_sum else _sum(x, residual, vectors, dim)
    u = _affine(v, vectors.norm_scale, vectors.norm_shift, dim)
    grad_u, grad_weight = eager.backward(widened(grad), u, vectors, options)
    grad_v = _affine(grad_u, vectors.norm_scale, None, dim)
    if grad_sum is not None:
        grad_v = grad_v + grad_sum
    grad_x = _affine(_affine(grad_v, vectors.layer_scale, None, dim), vectors.scale, None, dim)
    grad_x = grad_x.to(x.dtype)
    if residual is None:
        return grad_x, x.new_empty(0), grad_weight
    return grad_x, grad_v.to(x.dtype), grad_weight
