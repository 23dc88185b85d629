"""The fused operator in torch operators; the CPU's compiled kernels are compiled from it, too.

Runs below autograd. Floor 0: torch and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager
from .records import Options, Vectors
from .reference import per_channel


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _affine(v: Tensor, scale: Tensor | None, shift: Tensor | None, channel_dim: int) -> Tensor:
    scale, shift = (None if p is None else per_channel(p.to(v.dtype), v.dim(), channel_dim) for p in (scale, shift))
    if scale is not None and shift is not None:
        return torch.addcmul(shift, v, scale)
    return v if scale is None else v * scale


def _sum(x: Tensor, residual: Tensor | None, vectors: Vectors, channel_dim: int) -> Tensor:
    """Return v in the computing dtype."""
    v = _affine(x, vectors.scale, vectors.shift, channel_dim)
    v = _affine(v, vectors.layer_scale, None, channel_dim)
    return v if residual is None else v + residual


def forward(
    x: Tensor, residual: Tensor | None, shortcut: Tensor | None, vectors: Vectors, options: Options
) -> tuple[Tensor, Tensor]:
    """Return y, and v (empty unless wanted), in the dtype and memory format of x."""
    dim, want_sum = options.channel_dim, options.want_sum
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    v = _sum(x.to(dtype), _wide(residual, dtype), vectors, dim)
    rounded = v.to(x.dtype)
    if want_sum:
        v = rounded.to(dtype)  # y is the function of exactly what others see
    u = _affine(v, vectors.norm_scale, vectors.norm_shift, dim)
    y = eager.forward(u, vectors, options)
    if shortcut is not None:
        y += shortcut
    y = y.to(x.dtype)
    return y, (rounded if want_sum else x.new_empty(0))


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
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    v = x.to(dtype) if want_sum else _sum(x.to(dtype), _wide(residual, dtype), vectors, dim)
    u = _affine(v, vectors.norm_scale, vectors.norm_shift, dim)
    grad_u, grad_weight = eager.backward(grad.to(dtype), u, vectors, options)
    grad_v = _affine(grad_u, vectors.norm_scale, None, dim)
    if grad_sum is not None:
        grad_v = grad_v + grad_sum
    grad_x = _affine(_affine(grad_v, vectors.layer_scale, None, dim), vectors.scale, None, dim)
    grad_x = grad_x.to(x.dtype)
    if residual is None:
        return grad_x, x.new_empty(0), grad_weight
    return grad_x, grad_v.to(x.dtype), grad_weight
