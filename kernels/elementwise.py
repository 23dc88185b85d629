"""The fused operator, forward and backward: one kernel each for every activation, layout and prologue.

    v = (x * scale[c] + shift[c]) * layer_scale[c] + residual,   u = v * norm_scale[c] + norm_shift[c],   y = act(s(u))

Each factor is off unless given (a None pointer is a compile-time constant). Norm, then sum, then activation is what
post-activation networks do; sum, norm, activation, with v read by the next sum too, is pre-activation. The backward
kernel recomputes u and s from x: it reads x and the output's gradient and writes the input's gradient, nothing else
is kept.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    affine,
    elements,
    load_channel,
    pre_activation,
    program_tile,
    sparsify,
    sparsify_gradient,
    tile_offsets,
)
from .device_activations import ACTIVATIONS
from .layout import laid_out_like, planned, vector_of_channels

# Sizes and strides stay unspecialised: VECTOR already says what divides them, so a new shape compiles nothing.
_SIZES = ["rows", "cols", "outer_stride", "row_stride", "steepness"]


@triton.jit(do_not_specialize=_SIZES)
def mean_sparse_forward_kernel(
    x_ptr, y_ptr, sum_ptr, residual_ptr,  # [outer, rows, cols]
    centre_ptr, threshold_ptr, weight_ptr, scale_ptr, shift_ptr, layer_scale_ptr, norm_scale_ptr, norm_shift_ptr,  # [C]
    rows, cols, outer_stride, row_stride, steepness,
    VALUE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, VARIANT: tl.constexpr, WEIGHT_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = act(s(u)), and v where ``sum_ptr`` is given."""
    rows, cols = elements(rows, 1, WIDE), elements(cols, VECTOR, WIDE)
    outer_stride, row_stride = elements(outer_stride, VECTOR, WIDE), elements(row_stride, VECTOR, WIDE)
    outer, row_block, col_block = program_tile(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    row_offsets, col_offsets, offsets, dense_offsets, mask = tile_offsets(
        outer, row_block, col_block, rows, cols, outer_stride, row_stride, BLOCK_ROWS, BLOCK_COLS
    )
    channels = col_offsets if CHANNELS_LAST else row_offsets
    channel_mask = (col_offsets < cols) if CHANNELS_LAST else (row_offsets < rows)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    centre = load_channel(centre_ptr, channels, channel_mask)
    threshold = load_channel(threshold_ptr, channels, channel_mask)
    weight = None
    if weight_ptr is not None:
        weight = load_channel(weight_ptr, channels * WEIGHT_STRIDE, channel_mask)
    v = pre_activation(
        x, residual_ptr, scale_ptr, shift_ptr, layer_scale_ptr, channels, channel_mask, dense_offsets, mask
    )
    if sum_ptr is not None:
        # The caller sees v in its own dtype, so y is the function of exactly that.
        rounded = v.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + dense_offsets, rounded, mask=mask)
        v = rounded.to(tl.float32)
    u = affine(v, norm_scale_ptr, norm_shift_ptr, channels, channel_mask)
    y = VALUE(sparsify(u, centre, threshold, steepness, VARIANT), weight, A, B)
    tl.store(y_ptr + dense_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def mean_sparse_backward_kernel(
    x_ptr, grad_ptr, grad_sum_ptr, residual_ptr, grad_x_ptr, grad_v_ptr,  # [outer, rows, cols]
    centre_ptr, threshold_ptr, weight_ptr, scale_ptr, shift_ptr, layer_scale_ptr, norm_scale_ptr, norm_shift_ptr,  # [C]
    grad_weight_ptr,  # [tiles per channel, C], one partial sum a tile
    rows, cols, outer_stride, row_stride, steepness,
    GRADIENT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    VARIANT: tl.constexpr, BACKWARD: tl.constexpr, WEIGHT_STRIDE: tl.constexpr, FROM_SUM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_v = grad_y * act'(s(u)) * s'(u) * norm_scale + grad_sum,   grad_x = grad_v * layer_scale * scale."""
    rows, cols = elements(rows, 1, WIDE), elements(cols, VECTOR, WIDE)
    outer_stride, row_stride = elements(outer_stride, VECTOR, WIDE), elements(row_stride, VECTOR, WIDE)
    outer, row_block, col_block = program_tile(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    row_offsets, col_offsets, offsets, dense_offsets, mask = tile_offsets(
        outer, row_block, col_block, rows, cols, outer_stride, row_stride, BLOCK_ROWS, BLOCK_COLS
    )
    channels = col_offsets if CHANNELS_LAST else row_offsets
    channel_mask = (col_offsets < cols) if CHANNELS_LAST else (row_offsets < rows)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + dense_offsets, mask=mask, other=0.0).to(tl.float32)
    centre = load_channel(centre_ptr, channels, channel_mask)
    threshold = load_channel(threshold_ptr, channels, channel_mask)
    weight = None
    if weight_ptr is not None:
        weight = load_channel(weight_ptr, channels * WEIGHT_STRIDE, channel_mask)
    v = x.to(tl.float32)
    if not FROM_SUM:
        v = pre_activation(
            x, residual_ptr, scale_ptr, shift_ptr, layer_scale_ptr, channels, channel_mask, dense_offsets, mask
        )
    u = affine(v, norm_scale_ptr, norm_shift_ptr, channels, channel_mask)
    s = sparsify(u, centre, threshold, steepness, VARIANT)
    if grad_weight_ptr is not None:
        contribution = tl.where(mask, WEIGHT_GRADIENT(grad, s, weight, A, B), 0.0)
        if CHANNELS_LAST:
            part = outer * tl.cdiv(rows, BLOCK_ROWS) + row_block
            sums = tl.sum(contribution, axis=0)[None, :]
            tl.store(grad_weight_ptr + part * cols + channels, sums, mask=channel_mask)
        else:
            part = outer * tl.cdiv(cols, BLOCK_COLS) + col_block
            sums = tl.sum(contribution, axis=1)[:, None]
            tl.store(grad_weight_ptr + part * rows + channels, sums, mask=channel_mask)
    grad_s = GRADIENT(grad, s, weight, A, B)
    grad_v = sparsify_gradient(grad_s, u, centre, threshold, steepness, VARIANT, BACKWARD)
    grad_v = affine(grad_v, norm_scale_ptr, None, channels, channel_mask)
    if grad_sum_ptr is not None:
        grad_v += tl.load(grad_sum_ptr + dense_offsets, mask=mask, other=0.0).to(tl.float32)
    if grad_v_ptr is not None:
        tl.store(grad_v_ptr + dense_offsets, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
    grad_x = affine(grad_v, layer_scale_ptr, None, channels, channel_mask)
    grad_x = affine(grad_x, scale_ptr, None, channels, channel_mask)
    tl.store(grad_x_ptr + dense_offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


class Vectors(NamedTuple):
    """The per-channel arguments, contiguous and checked, in the order of the kernels' parameters."""

    centre: Tensor
    threshold: Tensor
    weight: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    layer_scale: Tensor | None
    norm_scale: Tensor | None
    norm_shift: Tensor | None


def _vectors(channels: int, weight: Tensor | None, **vectors: Tensor | None) -> Vectors:
    if weight is not None and weight.numel() != 1:
        weight = vector_of_channels(weight, channels, "weight")
    return Vectors(weight=weight, **{name: vector_of_channels(v, channels, name) for name, v in vectors.items()})


def compile_time_constants(constants: Sequence[float]) -> dict[str, float]:
    """Return an activation's constants as the kernels' A and B."""
    first, second = (*map(float, constants), 0.0, 0.0)[:2]
    return {"A": first, "B": second}


def weight_stride(weight: Tensor | None) -> int:
    """Return 1 for a slope per channel, 0 for one that all channels share."""
    return 0 if weight is None or weight.numel() == 1 else 1


def mean_sparse_forward(
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    channel_dim: int,
    activation: str = "identity",
    constants: Sequence[float] = (),
    weight: Tensor | None = None,
    variant: str = "mean",
    steepness: float = 10.0,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    want_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return act(s(u)), and v with ``want_sum``, in the dtype and memory format of x.

    Args:
        x: float32, float16 or bfloat16, of any layout; copied at most once.
        centre: ``[C]``, float32.
        threshold: ``[C]``, float32; negative means the identity.
        channel_dim: Dimension of x that holds the channels, not negative.
        activation: A name in `device_activations.ACTIVATIONS`.
        constants: Scalar arguments of the activation.
        weight: ``[C]`` or ``[1]``, a learned slope.
        variant: ``mean``, ``edge`` or ``smooth``.
        steepness: Of the smooth gate.
        scale: ``[C]``, of a frozen batch norm: weight / sqrt(variance + eps).
        shift: ``[C]``, of a frozen batch norm: bias - mean * scale.
        residual: Of x's shape, added behind the norm.
        layer_scale: ``[C]``, multiplied before the residual is added.
        norm_scale: ``[C]``, as scale, of a frozen batch norm behind the sum.
        norm_shift: ``[C]``, as shift, of the same.
        want_sum: Also return v. It is rounded to x's dtype first, and y is the function of the rounded v.
    """
    channels = x.shape[channel_dim]
    vectors = _vectors(
        channels, weight, centre=centre, threshold=threshold, scale=scale, shift=shift, layer_scale=layer_scale,
        norm_scale=norm_scale, norm_shift=norm_shift,
    )  # fmt: skip
    if x.numel() == 0:
        return (torch.empty_like(x), torch.empty_like(x)) if want_sum else torch.empty_like(x)
    x, y, plan = planned(x, channel_dim)
    v = torch.empty_like(y) if want_sum else None
    residual = None if residual is None else laid_out_like(residual, y)
    with torch.cuda.device_of(x):
        mean_sparse_forward_kernel[plan.grid](
            x, y, v, residual, *vectors, *plan.sizes, float(steepness),
            VALUE=ACTIVATIONS[activation].value, **compile_time_constants(constants), VARIANT=variant,
            WEIGHT_STRIDE=weight_stride(weight), **plan.constexprs, **plan.options,
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
    centre: Tensor,
    threshold: Tensor,
    channel_dim: int,
    activation: str = "identity",
    constants: Sequence[float] = (),
    weight: Tensor | None = None,
    variant: str = "mean",
    backward: str = "exact",
    steepness: float = 10.0,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    norm_scale: Tensor | None = None,
    norm_shift: Tensor | None = None,
    grad_sum: Tensor | None = None,
    from_sum: bool = False,
    want_grad_sum: bool = False,
) -> Gradients:
    """Return the gradients of x, of the sum and of the learned slope.

    Args:
        grad_y: Gradient of y, of x's shape; brought to x's layout if it has another.
        x: As in `mean_sparse_forward`, or the v that it returned, with ``from_sum``.
        centre: As in `mean_sparse_forward`, like every argument not named here.
        threshold: As above.
        channel_dim: As above.
        activation: As above.
        constants: As above.
        weight: As above.
        variant: As above.
        backward: ``exact``, ``identity`` or ``smooth``.
        steepness: As above.
        scale: As above.
        shift: As above.
        residual: As above; not read with ``from_sum``.
        layer_scale: As above.
        norm_scale: As above.
        norm_shift: As above.
        grad_sum: Gradient of the second output v, where it has one.
        from_sum: x is v already. A forward with ``want_sum`` needs it, since that one rounded v.
        want_grad_sum: Also return the gradient of v.
    """
    channels = x.shape[channel_dim]
    row = ACTIVATIONS[activation]
    vectors = _vectors(
        channels, weight, centre=centre, threshold=threshold, scale=scale, shift=shift, layer_scale=layer_scale,
        norm_scale=norm_scale, norm_shift=norm_shift,
    )  # fmt: skip
    if x.numel() == 0:
        grad_x = torch.empty_like(x)
        return Gradients(
            grad_x, grad_x if want_grad_sum else None, None if weight is None else torch.zeros_like(weight)
        )
    x, grad_x, plan = planned(x, channel_dim)
    scaled = scale is not None or layer_scale is not None
    grad_v = torch.empty_like(grad_x) if want_grad_sum and scaled else None
    parts = None
    if weight is not None:
        parts = torch.empty(plan.tiles_per_channel, channels, dtype=torch.float32, device=x.device)
    grad_y, grad_sum, residual = (
        None if t is None else laid_out_like(t, grad_x) for t in (grad_y, grad_sum, None if from_sum else residual)
    )
    with torch.cuda.device_of(x):
        mean_sparse_backward_kernel[plan.grid](
            x, grad_y, grad_sum, residual, grad_x, grad_v, *vectors, parts, *plan.sizes, float(steepness),
            GRADIENT=row.gradient, WEIGHT_GRADIENT=row.weight_gradient, **compile_time_constants(constants),
            VARIANT=variant, BACKWARD=backward, WEIGHT_STRIDE=weight_stride(weight),
            FROM_SUM=from_sum, **plan.constexprs, **plan.options,
        )  # fmt: skip
    grad_weight = None
    if parts is not None:
        # The second stage, in float64: deterministic, and parts are thousands of times fewer than elements.
        sums = parts.sum(None if weight.numel() == 1 else 0, dtype=torch.float64)
        grad_weight = sums.to(weight.dtype).view(weight.shape)
    return Gradients(grad_x, (grad_x if grad_v is None else grad_v) if want_grad_sum else None, grad_weight)
