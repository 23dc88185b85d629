"""Triton device functions of the operator: where a program's tile lies, s(x) and its derivative.

A tensor is seen as ``[outer, rows, cols]`` with cols contiguous (`layout.plan`); a program owns one tile of rows
by columns. Channels run along the columns (channels_last, tokens) or along the rows (N,C,H,W), so the channel's
centre and threshold are loaded once for the tile and nothing is divided per element.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def elements(units, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """A size or stride in elements, from units of VECTOR: the product is what proves alignment to the compiler."""
    if WIDE:  # offsets reach 2^31
        units = units.to(tl.int64)
    return units * VECTOR


@triton.jit
def tile_offsets(
    outer,
    row_block,
    col_block,
    rows,
    cols,
    outer_stride,
    row_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Return row and column indices, offsets into the input, offsets into the dense output, and the mask."""
    row_offsets = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    col_offsets = (col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    mask = (row_offsets < rows) & (col_offsets < cols)
    offsets = outer * outer_stride + row_offsets * row_stride + col_offsets
    dense_offsets = outer * (rows * cols) + row_offsets * cols + col_offsets
    return row_offsets, col_offsets, offsets, dense_offsets, mask


@triton.jit
def program_tile(rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Return the slab, row block and column block of this program: three scalar divisions for a whole tile."""
    program = tl.program_id(0)
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    slab_blocks = program // col_blocks
    return slab_blocks // row_blocks, slab_blocks % row_blocks, program % col_blocks


@triton.jit
def load_channel(ptr, channels, channel_mask):
    """A per-channel vector in float32, broadcastable against the tile."""
    return tl.load(ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)


@triton.jit
def affine(v, scale_ptr, shift_ptr, channels, channel_mask):
    """v * scale + shift per channel, each where its pointer is given: a frozen batch norm."""
    if scale_ptr is not None:
        v = v * load_channel(scale_ptr, channels, channel_mask)
    if shift_ptr is not None:
        v = v + load_channel(shift_ptr, channels, channel_mask)
    return v


@triton.jit
def pre_activation(x, residual_ptr, scale_ptr, shift_ptr, layer_scale_ptr, channels, channel_mask, dense_offsets, mask):
    """v in float32: frozen batch norm, LayerScale, residual add, each where its pointer is given."""
    v = affine(x.to(tl.float32), scale_ptr, shift_ptr, channels, channel_mask)
    if layer_scale_ptr is not None:
        v = v * load_channel(layer_scale_ptr, channels, channel_mask)
    if residual_ptr is not None:
        v = v + tl.load(residual_ptr + dense_offsets, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def sparsify(u, centre, threshold, steepness, VARIANT: tl.constexpr):
    """s = centre where |u - centre| <= threshold, else u; NaN and a negative threshold are never inside.

    Without a band (``none``) s is u.
    """
    distance = u - centre
    if VARIANT == "smooth":
        gate = smooth_gate(distance, threshold, steepness)
        s = tl.where((threshold >= 0) & (tl.abs(distance) < float("inf")), centre + distance * gate, u)
    elif VARIANT == "edge":
        edge = tl.where(distance < 0, centre - threshold, centre + threshold)
        s = tl.where(tl.abs(distance) <= threshold, edge, u)
    elif VARIANT == "none":
        s = u
    else:
        s = tl.where(tl.abs(distance) <= threshold, centre, u)
    return s


@triton.jit
def smooth_gate(distance, threshold, steepness):
    """sigmoid(steepness * (|d| / threshold - 1)); divides per channel, by no less than float32's smallest normal."""
    inverse_threshold = 1.0 / tl.maximum(threshold, 1.1754943508222875e-38)
    return tl.sigmoid(steepness * (tl.abs(distance) * inverse_threshold - 1.0))


@triton.jit
def sparsify_gradient(grad, u, centre, threshold, steepness, VARIANT: tl.constexpr, BACKWARD: tl.constexpr):
    """grad * ds/du: zero inside the band (exact), one (identity), or that of the smooth gate (smooth)."""
    distance = u - centre
    if BACKWARD == "identity":
        grad_u = grad
    elif BACKWARD == "smooth" or VARIANT == "smooth":
        # d/du [d * g] = g + |d| / threshold * steepness * g * (1 - g),   d = u - centre
        gate = smooth_gate(distance, threshold, steepness)
        relative = tl.abs(distance) * (1.0 / tl.maximum(threshold, 1.1754943508222875e-38))
        # Far out this is infinity times zero; its limit is zero.
        tail = tl.where(gate < 1.0, relative * steepness * gate * (1.0 - gate), 0.0)
        grad_u = tl.where((threshold >= 0) & (tl.abs(distance) < float("inf")), grad * (gate + tail), grad)
    else:
        grad_u = tl.where(tl.abs(distance) <= threshold, 0.0, grad)
    return grad_u
