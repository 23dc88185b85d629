"""Channel moments in one read of x: count, mean and M2, and the activation's output with them if wanted.

Two launches, no atomics, no host synchronisation, the same bits every time. The first gives each program a run of
tiles; it takes every value relative to its channel's first element, so that a large mean costs no digits, computes
a tile's mean and M2 in two passes over registers (corrected for the mean's own rounding) and merges the tiles by
Chan's formula. The second merges the programs' parts in float64.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .device_activations import ACTIVATIONS, compile_time_constants, weight_stride
from .tiles import OPTIONS, planned, vector_of_channels

_SIZES = ["outer_slabs", "rows", "cols", "outer_stride", "row_stride", "steps", "parts", "channels", "channel_stride"]

# First-stage programs, one warp each: some four waves on the largest GPU.
PROGRAMS = 16384
# Parts of a channel, for the second stage to merge in a few microseconds. Its tile is 256 parts by 8 channels.
PARTS = 1024
MERGED_PARTS, MERGED_CHANNELS = 256, 8


class Moments(NamedTuple):
    """What `channel_moments` returns.

    Attributes:
        count: Elements of each channel.
        mean: ``[C]``, float64; zero where count is zero.
        m2: ``[C]``, float64, sum of squared distances from the mean.
    """

    count: int
    mean: Tensor
    m2: Tensor


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
def load_channel(ptr, channels, channel_mask):
    """A per-channel vector in float32, broadcastable against the tile."""
    return tl.load(ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    x_ptr, y_ptr,  # [outer, rows, cols]
    weight_ptr,  # [C]
    parts_ptr,  # [3, parts, C]: count, mean relative to the channel's first element, M2
    outer_slabs, rows, cols, outer_stride, row_stride, steps, parts,
    VALUE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, WEIGHT_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One part: moments of a run of ``steps`` tiles of the same channels; y = act(x) where ``y_ptr`` is given."""
    rows, cols = elements(rows, 1, WIDE), elements(cols, VECTOR, WIDE)
    outer_stride, row_stride = elements(outer_stride, VECTOR, WIDE), elements(row_stride, VECTOR, WIDE)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0)
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channel_block, part, walk = program % col_blocks, program // col_blocks, row_blocks
        channels = (channel_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
        channel_mask = channels < cols
        firsts = channels
        total_channels = cols
    else:
        channel_block, part, walk = program % row_blocks, program // row_blocks, col_blocks
        channels = (channel_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
        channel_mask = channels < rows
        firsts = channels * row_stride
        total_channels = rows
    first = load_channel(x_ptr, firsts, channel_mask)
    weight = None
    if weight_ptr is not None:
        weight = load_channel(weight_ptr, channels * WEIGHT_STRIDE, channel_mask)
    count = 0.0
    mean = tl.zeros_like(first)
    m2 = tl.zeros_like(first)
    start = part * steps
    for tile in range(start, tl.minimum(start + steps, outer_slabs * walk)):
        outer, block = tile // walk, tile % walk
        row_block = block if CHANNELS_LAST else channel_block
        col_block = channel_block if CHANNELS_LAST else block
        _, _, offsets, dense_offsets, mask = tile_offsets(
            outer, row_block, col_block, rows, cols, outer_stride, row_stride, BLOCK_ROWS, BLOCK_COLS
        )
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            tl.store(y_ptr + dense_offsets, VALUE(x, weight, A, B).to(y_ptr.dtype.element_ty), mask=mask)
        # Two passes over the tile. d's own mean is rounded, so the second pass measures what that left over.
        d = tl.where(mask, x - first, 0.0)
        length = tl.minimum(rows - row_block * BLOCK_ROWS, BLOCK_ROWS)
        if not CHANNELS_LAST:
            length = tl.minimum(cols - col_block * BLOCK_COLS, BLOCK_COLS)
        tile_count = length.to(tl.float32)
        inverse = 1.0 / tile_count
        rough = tl.sum(d, axis=axis, keep_dims=True) * inverse
        d = tl.where(mask, d - rough, 0.0)
        left = tl.sum(d, axis=axis, keep_dims=True)
        tile_m2 = tl.sum(d * d, axis=axis, keep_dims=True) - left * left * inverse
        # Chan: mean += delta n_b / n,   M2 += M2_b + delta^2 n_a n_b / n
        delta = rough + left * inverse - mean
        share = tile_count / (count + tile_count)
        mean += delta * share
        m2 += tile_m2 + delta * delta * count * share
        count += tile_count
    at = parts_ptr + part * total_channels + channels
    tl.store(at, tl.zeros_like(mean) + count, mask=channel_mask)
    tl.store(at + parts * total_channels, mean, mask=channel_mask)
    tl.store(at + 2 * parts * total_channels, m2, mask=channel_mask)


@triton.jit(do_not_specialize=_SIZES)
def merge_moments_kernel(
    parts_ptr,  # [3, parts, C]
    x_ptr, mean_ptr, m2_ptr,
    parts, channels, channel_stride,
    BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """mean and M2 of a block of channels in float64: the mean of all parts first, then M2 about it."""
    columns = (tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[None, :]
    column_mask = columns < channels
    total = tl.zeros([1, BLOCK_CHANNELS], tl.float64)
    mean = tl.zeros([1, BLOCK_CHANNELS], tl.float64)
    m2 = tl.zeros([1, BLOCK_CHANNELS], tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        mask = (part < parts) & column_mask
        at = parts_ptr + part * channels + columns
        counts = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        means = tl.load(at + parts * channels, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(counts, axis=0, keep_dims=True)
        mean += tl.sum(counts * means, axis=0, keep_dims=True)
    mean = mean / tl.where(total > 0, total, 1.0)
    for start in range(0, parts, BLOCK_PARTS):
        part = (start + tl.arange(0, BLOCK_PARTS))[:, None]
        mask = (part < parts) & column_mask
        at = parts_ptr + part * channels + columns
        counts = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        means = tl.load(at + parts * channels, mask=mask, other=0.0).to(tl.float64)
        parts_m2 = tl.load(at + 2 * parts * channels, mask=mask, other=0.0).to(tl.float64)
        delta = tl.where(mask, means - mean, 0.0)
        m2 += tl.sum(parts_m2 + counts * delta * delta, axis=0, keep_dims=True)
    first = tl.load(x_ptr + columns.to(tl.int64) * channel_stride, mask=column_mask, other=0.0).to(tl.float64)
    tl.store(mean_ptr + columns, first + mean, mask=column_mask)
    tl.store(m2_ptr + columns, m2, mask=column_mask)


def _moments(
    x: Tensor, channel_dim: int, activation: str | None, constants: Sequence[float], weight: Tensor | None
) -> tuple[Tensor | None, Moments]:
    channels = x.shape[channel_dim]
    if weight is not None and weight.numel() != 1:
        weight = vector_of_channels(weight, channels, "weight")
    if x.numel() == 0:
        zeros = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
        return None if activation is None else torch.empty_like(x), Moments(0, zeros[0], zeros[1])
    x, y, plan = planned(x, channel_dim)
    channel_blocks, tiles = plan.col_blocks if plan.channels_last else plan.row_blocks, plan.tiles_per_channel
    steps = max(-(-tiles * channel_blocks // PROGRAMS), -(-tiles // PARTS))
    parts = -(-tiles // steps)
    partial = torch.empty(3, parts, channels, dtype=torch.float32, device=x.device)
    mean, m2 = (torch.empty(channels, dtype=torch.float64, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        moments_kernel[(channel_blocks * parts,)](
            x, None if activation is None else y, weight, partial, plan.outer, *plan.sizes, steps, parts,
            VALUE=ACTIVATIONS[activation or "identity"].value, **compile_time_constants(constants),
            WEIGHT_STRIDE=weight_stride(weight), **plan.constexprs, **OPTIONS,
        )  # fmt: skip
        merge_moments_kernel[(-(-channels // MERGED_CHANNELS),)](
            partial, x, mean, m2, parts, channels, 1 if plan.channels_last else plan.row_stride,
            BLOCK_PARTS=MERGED_PARTS, BLOCK_CHANNELS=MERGED_CHANNELS, **layout.OPTIONS,
        )  # fmt: skip
    return None if activation is None else y, Moments(x.numel() // channels, mean, m2)


def channel_moments(x: Tensor, channel_dim: int) -> Moments:
    """Return the count, mean and M2 of each channel of x, read once; NaN and inf make their channel's non-finite.

    Args:
        x: float32, float16 or bfloat16, of any layout; copied at most once.
        channel_dim: Dimension of x that holds the channels, not negative.
    """
    return _moments(x, channel_dim, None, (), None)[1]


def activation_moments(
    x: Tensor, channel_dim: int, activation: str, constants: Sequence[float] = (), weight: Tensor | None = None
) -> tuple[Tensor, Moments]:
    """Return act(x) and the moments of x, from the same single read.

    Args:
        x: As in `channel_moments`.
        channel_dim: As in `channel_moments`.
        activation: A name in `device_activations.ACTIVATIONS`.
        constants: Scalar arguments of the activation.
        weight: ``[C]`` or ``[1]``, a learned slope.
    """
    return _moments(x, channel_dim, activation, constants, weight)
