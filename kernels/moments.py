"""Channel moments in one read of x: count, mean and M2, and the activation's output with them if wanted.

Two launches, no atomics, no host synchronisation, the same bits every time. In the first, a program walks tiles of the
same channels, so that each of its lanes stays with one channel and adds up on its own: three instructions an element,
and one sum over lanes at the end. Values are taken relative to the mean of the program's first tile, which is that of
some of the values to be added: it is at most sqrt(STEPS) of their deviations away, whatever their mean, and that is
all that is cancelled. The second launch merges the programs' parts in float64, by Chan's formula.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout
from .device_activations import activation_constexprs

_SIZES = ["outer", "rows", "cols", "outer_stride", "steps", "parts", "channel_stride"]

# A program is a single warp, which needs no shared memory and no barrier to add up its lanes.
OPTIONS = {**layout.OPTIONS, "num_warps": 1}
TILE = 512  # elements: four 128-bit loads in flight for a thread in float32, two in half precision
# First-stage programs, one warp each: all that the largest GPU has at a time.
PROGRAMS = 8192
# Tiles of a program at most: its first tile's mean is sqrt(STEPS) deviations away at worst, which costs M2 four bits.
STEPS = 16
MERGED_PARTS = 1024  # that the second stage reads at a time, one program a channel

Moments = tuple[int, Tensor, Tensor]  # count of each channel, mean and M2 (``[C]``, float64)


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tensor as ``[outer, rows, cols]``, rows by cols dense, and the tile that a program takes at a time.

    Attributes:
        outer, rows, cols: ``N, C, H * W``, or with channels last the number of slabs, positions and C.
        outer_stride: Elements between slabs of the input; the output is dense.
        channels_last: Whether channels run along the columns.
        vector: Power of two that divides cols and the stride, up to 128 bits of elements. Kernels take both in units of
            it, which is how the compiler knows that 128-bit accesses are aligned.
        block_rows, block_cols: Of a tile, powers of two.
        wide: Whether offsets need 64 bits.
    """

    outer: int
    rows: int
    cols: int
    outer_stride: int
    channels_last: bool
    vector: int
    block_rows: int
    block_cols: int
    wide: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernel's first integer arguments."""
        return self.outer, self.rows, self.cols // self.vector, self.outer_stride // self.vector

    @property
    def constexprs(self) -> dict[str, int | bool]:
        """The kernel's compile-time arguments."""
        return {
            "CHANNELS_LAST": self.channels_last, "VECTOR": self.vector, "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLS": self.block_cols, "WIDE": self.wide,
        }  # fmt: skip


@lru_cache(maxsize=4096)
def tiles_of(
    shape: tuple[int, ...], strides: tuple[int, ...], dense: tuple[int, ...], channel_dim: int, itemsize: int
) -> Tiles | None:
    """Return how to walk a tensor; arguments and None as in `layout.layout_of`, and where a slab is no ``[C, HW]``."""
    found = layout.slabs_of(shape, strides, dense)
    if found is None:
        return None
    slab, outer_stride = found
    count, channels = torch.Size(shape).numel(), shape[channel_dim]
    inner = dense[channel_dim] if channels > 1 else slab
    channels_last = channels > 1 and inner == 1
    rows, cols = (slab // channels, channels) if channels_last else (channels, inner)
    if slab == count:
        outer_stride = rows * cols
    elif slab != rows * cols or (channels_last and rows == 1):
        return None
    vector = 16 // itemsize
    while cols % vector or outer_stride % vector:
        vector //= 2
    # Down to 64 bytes a row's part of a tile still fills whole sectors.
    candidates = (64, 32) if channels_last else (512, 256, 128, 64)
    block_cols = min(1 << (cols - 1).bit_length(), _block(cols, candidates))
    block_rows = min(1 << (rows - 1).bit_length(), TILE // block_cols)
    outer = count // (rows * cols)
    wide = max(count, (outer - 1) * outer_stride + rows * cols) + TILE > layout.INT32_ELEMENTS
    return Tiles(outer, rows, cols, outer_stride, channels_last, vector, block_rows, block_cols, wide)


def _block(size: int, candidates: Sequence[int]) -> int:
    """Return the largest extent that leaves less than 15% of lanes idle, or the one that leaves the fewest."""
    padded = {block: -(-size // block) * block for block in candidates}
    return next((b for b in candidates if padded[b] <= 1.15 * size), min(candidates, key=lambda b: (padded[b], -b)))


@triton.jit
def load_vector(ptr, channels, channel_mask):
    """A per-channel vector in float32, broadcastable against the tile."""
    return tl.load(ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)


@triton.jit
def tile_offsets(
    tile, channel_block, walk, rows, cols, outer_stride,
    CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Return offsets into the input and into the dense output, the mask, and how many of a row or column are in it."""
    outer, block = tile // walk, tile % walk
    row_start = (block if CHANNELS_LAST else channel_block) * BLOCK_ROWS
    col_start = (channel_block if CHANNELS_LAST else block) * BLOCK_COLS
    row = (row_start + tl.arange(0, BLOCK_ROWS))[:, None]
    col = (col_start + tl.arange(0, BLOCK_COLS))[None, :]
    length = tl.minimum(rows - row_start, BLOCK_ROWS)
    if not CHANNELS_LAST:
        length = tl.minimum(cols - col_start, BLOCK_COLS)
    place = row * cols + col
    offsets, dense_offsets = outer * outer_stride + place, outer * (rows * cols) + place
    return offsets, dense_offsets, (row < rows) & (col < cols), length.to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    x_ptr, y_ptr,  # [outer, rows, cols]
    weight_ptr,  # [C]
    parts_ptr,  # [3, C, parts]: count, mean relative to the channel's first element, M2
    outer, rows, cols, outer_stride, steps, parts,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr, WEIGHT_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One part: moments of a run of ``steps`` tiles of the same channels; y = act(x) where ``y_ptr`` is given."""
    if WIDE:  # offsets reach 2^31
        rows, cols, outer_stride = rows.to(tl.int64), cols.to(tl.int64), outer_stride.to(tl.int64)
    cols, outer_stride = cols * VECTOR, outer_stride * VECTOR  # products, which prove alignment to the compiler
    row_blocks, col_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS)
    axis: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channel_blocks, walk, total_channels = col_blocks, row_blocks, cols
        lane, first_stride = tl.arange(0, BLOCK_COLS)[None, :], 1
    else:
        channel_blocks, walk, total_channels = row_blocks, col_blocks, rows
        lane, first_stride = tl.arange(0, BLOCK_ROWS)[:, None], cols
    channel_block, part = tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks
    channels = channel_block * (BLOCK_COLS if CHANNELS_LAST else BLOCK_ROWS) + lane
    channel_mask = channels < total_channels
    first = load_vector(x_ptr, channels * first_stride, channel_mask)
    weight = None
    if weight_ptr is not None:
        weight = load_vector(weight_ptr, channels * WEIGHT_STRIDE, channel_mask)
    start = part * steps
    offsets, _, mask, length = tile_offsets(
        start, channel_block, walk, rows, cols, outer_stride, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS
    )
    # By way of the first element, so that a channel of one value has no deviation at all.
    d = tl.where(mask, tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - first, 0.0)
    shift = first + tl.sum(d, axis=axis, keep_dims=True) / length
    count = 0.0
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for tile in range(start, tl.minimum(start + steps, outer * walk)):
        offsets, dense_offsets, mask, length = tile_offsets(
            tile, channel_block, walk, rows, cols, outer_stride, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS
        )
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = ACTIVATION(x, x, weight, A, B)[0]
            tl.store(y_ptr + dense_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        d = tl.where(mask, x - shift, 0.0)
        total += d
        squares += d * d
        count += length
    left = tl.sum(total, axis=axis, keep_dims=True)
    mean = left / count
    m2 = tl.sum(squares, axis=axis, keep_dims=True) - left * mean
    at = parts_ptr + channels * parts + part
    tl.store(at, tl.zeros_like(mean) + count, mask=channel_mask)
    tl.store(at + parts * total_channels, shift - first + mean, mask=channel_mask)
    tl.store(at + 2 * parts * total_channels, m2, mask=channel_mask)


@triton.jit(do_not_specialize=_SIZES)
def merge_moments_kernel(
    parts_ptr,  # [3, C, parts]
    x_ptr, mean_ptr, m2_ptr,
    parts, channel_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """mean and M2 of a channel in float64: the mean of all parts first, then M2 about it."""
    channel, channels = tl.program_id(0), tl.num_programs(0)
    at = parts_ptr + channel * parts + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    mean = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        mask = start + tl.arange(0, BLOCK) < parts
        count = tl.load(at + start, mask=mask, other=0.0).to(tl.float64)
        total += count
        mean += count * tl.load(at + channels * parts + start, mask=mask, other=0.0).to(tl.float64)
    mean = tl.sum(mean, axis=0) / tl.sum(total, axis=0)
    m2 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        mask = start + tl.arange(0, BLOCK) < parts
        count = tl.load(at + start, mask=mask, other=0.0).to(tl.float64)
        delta = tl.load(at + channels * parts + start, mask=mask, other=0.0).to(tl.float64) - mean
        own = tl.load(at + 2 * channels * parts + start, mask=mask, other=0.0).to(tl.float64)
        m2 += tl.where(mask, own + count * delta * delta, 0.0)
    first = tl.load(x_ptr + channel.to(tl.int64) * channel_stride).to(tl.float64)
    tl.store(mean_ptr + channel, first + mean)
    tl.store(m2_ptr + channel, tl.sum(m2, axis=0))


def moments(
    x: Tensor, channel_dim: int, activation: str | None = None, constants: Sequence[float] = (),
    weight: Tensor | None = None,
) -> tuple[Tensor, Moments]:  # fmt: skip
    """Return act(x), and the count, mean and M2 of each channel of x, from one read.

    NaN and inf make their channel's moments non-finite. Without an activation there is no act(x), but a tensor on meta.

    Args:
        x: float32, float16 or bfloat16, of any layout, not empty; copied at most once.
        channel_dim: Dimension of x that holds the channels, not negative.
        activation: A name in `device_activations.ACTIVATIONS`.
        constants: Scalar arguments of the activation.
        weight: ``[C]`` or ``[1]``, a learned slope.
    """
    channels = x.shape[channel_dim]
    if weight is not None and weight.numel() not in (1, channels):
        raise ValueError(f"weight has {weight.numel()} elements for {channels} channels")
    if x.dtype not in layout.DTYPES:
        raise TypeError(f"the Triton kernels take float32, float16 or bfloat16, not {x.dtype}")
    y = torch.empty_like(x, device=x.device if activation else "meta")
    tiles = tiles_of(x.shape, x.stride(), y.stride(), channel_dim, x.element_size())
    if tiles is None:
        x = torch.empty_like(x).copy_(x)
        tiles = tiles_of(x.shape, x.stride(), y.stride(), channel_dim, x.element_size())
    blocks = -(-tiles.rows // tiles.block_rows), -(-tiles.cols // tiles.block_cols)
    walk, channel_blocks = blocks if tiles.channels_last else blocks[::-1]
    walk *= tiles.outer
    steps = min(-(-walk * channel_blocks // PROGRAMS), STEPS)
    parts = -(-walk // steps)
    partial = torch.empty(3, channels, parts, dtype=torch.float32, device=x.device)
    mean, m2 = torch.empty(2, channels, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        moments_kernel[(channel_blocks * parts,)](
            x, y if activation else None, None if weight is None else weight.contiguous(), partial,
            *tiles.sizes, steps, parts, **activation_constexprs(activation or "identity", constants, weight),
            **tiles.constexprs, **OPTIONS,
        )  # fmt: skip
        merge_moments_kernel[(channels,)](
            partial, x, mean, m2, parts, 1 if tiles.channels_last else tiles.cols, BLOCK=MERGED_PARTS, **layout.OPTIONS
        )
    return y, (x.numel() // channels, mean, m2)
