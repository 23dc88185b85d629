"""The fused operator, forward and backward: one kernel each for every activation, layout and prologue.

    v = (x * scale[c] + shift[c]) * layer_scale[c] + residual,   u = v * norm_scale[c] + norm_shift[c]
    y = act(s(u)) + shortcut

Each factor is off unless given (a None pointer is a compile-time constant). Norm, then sum, then activation is what
post-activation networks do; sum, norm, activation, with v read by the next sum too, is pre-activation; LayerScale and
shortcut around a bare operator are the end of a residual branch. The backward kernel recomputes u and s from x: it
reads x and the output's gradient and writes the input's gradient, nothing else is kept. Of the shortcut it knows
nothing: that one's gradient is y's.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

# Sizes and strides stay unspecialised: VECTOR already says what divides them, so a new shape compiles nothing.
_SIZES = ["rows", "cols", "outer_stride", "row_stride", "steepness"]


@triton.jit(do_not_specialize=_SIZES)
def mean_sparse_forward_kernel(
    x_ptr, y_ptr, sum_ptr, residual_ptr, shortcut_ptr,  # [outer, rows, cols]
    centre_ptr, threshold_ptr, weight_ptr, scale_ptr, shift_ptr, layer_scale_ptr, norm_scale_ptr, norm_shift_ptr,  # [C]
    rows, cols, outer_stride, row_stride, steepness,
    VALUE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, VARIANT: tl.constexpr, WEIGHT_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = act(s(u)) + shortcut, and v where ``sum_ptr`` is given."""
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
    if shortcut_ptr is not None:
        y += tl.load(shortcut_ptr + dense_offsets, mask=mask, other=0.0).to(tl.float32)
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
