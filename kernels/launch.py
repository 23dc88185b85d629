"""What launches the operator's kernels: arguments checked, layouts planned, results allocated.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .device_activations import ACTIVATIONS
from .elementwise import mean_sparse_backward_kernel, mean_sparse_forward_kernel
from .layout import laid_out_like, planned, vector_of_channels
from .records import Options, Vectors


def _checked(vectors: Vectors, channels: int) -> Vectors:
    """Return the vectors contiguous; a shared slope stays as it is."""
    named = zip(Vectors._fields, vectors, strict=True)
    shared = vectors.weight is not None and vectors.weight.numel() == 1
    return Vectors(*(v if n == "weight" and shared else vector_of_channels(v, channels, n) for n, v in named))


def compile_time_constants(constants: Sequence[float]) -> dict[str, float]:
    """Return an activation's constants as the kernels' A and B."""
    first, second = (*map(float, constants), 0.0, 0.0)[:2]
    return {"A": first, "B": second}


def weight_stride(weight: Tensor | None) -> int:
    """Return 1 for a slope per channel, 0 for one that all channels share."""
    return 0 if weight is None or weight.numel() == 1 else 1


def mean_sparse_forward(
    x: Tensor, vectors: Vectors, options: Options, residual: Tensor | None = None, shortcut: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return act(s(u)) + shortcut, and v with ``options.want_sum``, in the dtype and memory format of x.

    Args:
        x: float32, float16 or bfloat16, of any layout; copied at most once.
        vectors: Per channel, float32.
        options: Everything else. A v that is wanted is rounded to x's dtype first, and y is the function of that.
        residual: Of x's shape, or broadcasting to it; added before the operator and behind the norm.
        shortcut: Likewise; added behind the operator.
    """
    vectors = _checked(vectors, x.shape[options.channel_dim])
    want_sum = options.want_sum
    if x.numel() == 0:
        return (torch.empty_like(x), torch.empty_like(x)) if want_sum else torch.empty_like(x)
    x, y, plan = planned(x, options.channel_dim)
    v = torch.empty_like(y) if want_sum else None
    residual, shortcut = (None if t is None else laid_out_like(t, y) for t in (residual, shortcut))
    with torch.cuda.device_of(x):
        mean_sparse_forward_kernel[plan.grid](
            x, y, v, residual, shortcut, *vectors, *plan.sizes, float(options.steepness),
            VALUE=ACTIVATIONS[options.activation].value, **compile_time_constants(options.constants),
            VARIANT=options.variant, WEIGHT_STRIDE=weight_stride(vectors.weight), **plan.constexprs, **plan.options,
        )  # fmt: skip
    return y if v is None else (y, v)


class Gradients(NamedTuple):
    """What the backward kernel wrote.

    Attributes:
        x: Gradient of x.
        v: Gradient of the sum, which is the residual's; the same tensor as ``x`` where neither scale nor layer_scale
            stands between them. None unless asked for.
        weight: Gradient of the learned slope, None without one.
    """

    x: Tensor
    v: Tensor | None
    weight: Tensor | None


def mean_sparse_backward(
    grad_y: Tensor,
    x: Tensor,
    vectors: Vectors,
    options: Options,
    residual: Tensor | None = None,
    grad_sum: Tensor | None = None,
    want_grad_sum: bool = False,
) -> Gradients:
    """Return the gradients of x, of the sum and of the learned slope.

    Args:
        grad_y: Gradient of y, of x's shape; brought to x's layout if it has another.
        x: As in `mean_sparse_forward`; with ``options.want_sum`` the v that it returned, which was rounded.
        vectors: As in `mean_sparse_forward`.
        options: As in `mean_sparse_forward`.
        residual: As in `mean_sparse_forward`; not read with ``options.want_sum``.
        grad_sum: Gradient of the second output v, where it has one.
        want_grad_sum: Also return the gradient of v.
    """
    channels = x.shape[options.channel_dim]
    row = ACTIVATIONS[options.activation]
    vectors = _checked(vectors, channels)
    weight = vectors.weight
    if x.numel() == 0:
        grad_x = torch.empty_like(x)
        return Gradients(
            grad_x, grad_x if want_grad_sum else None, None if weight is None else torch.zeros_like(weight)
        )
    x, grad_x, plan = planned(x, options.channel_dim)
    scaled = vectors.scale is not None or vectors.layer_scale is not None
    grad_v = torch.empty_like(grad_x) if want_grad_sum and scaled else None
    parts = None
    if weight is not None:
        parts = torch.empty(plan.tiles_per_channel, channels, dtype=torch.float32, device=x.device)
    residual = None if options.want_sum else residual
    grad_y, grad_sum, residual = (None if t is None else laid_out_like(t, grad_x) for t in (grad_y, grad_sum, residual))
    with torch.cuda.device_of(x):
        mean_sparse_backward_kernel[plan.grid](
            x, grad_y, grad_sum, residual, grad_x, grad_v, *vectors, parts, *plan.sizes, float(options.steepness),
            GRADIENT=row.gradient, WEIGHT_GRADIENT=row.weight_gradient, **compile_time_constants(options.constants),
            VARIANT=options.variant, BACKWARD=options.backward, WEIGHT_STRIDE=weight_stride(weight),
            FROM_SUM=options.want_sum, **plan.constexprs, **plan.options,
        )  # fmt: skip
    grad_weight = None
    if parts is not None:
        # The second stage, in float64: deterministic, and parts are thousands of times fewer than elements.
        sums = parts.sum(None if weight.numel() == 1 else 0, dtype=torch.float64)
        grad_weight = sums.to(weight.dtype).view(weight.shape)
    return Gradients(grad_x, (grad_x if grad_v is None else grad_v) if want_grad_sum else None, grad_weight)
