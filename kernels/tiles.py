"""How the kernels of the moments walk a tensor: tiles of rows and columns, chosen once per shape and kept.

A tensor becomes ``[outer, rows, cols]`` with cols contiguous, in one of two ways. N,C,H,W contiguous: outer = N,
rows = C, cols = H*W, and a row has one channel. channels_last, N,L,C and N,C: rows are positions, cols = C.
Slices of the outer dimensions are walked as they lie; what fits neither map is copied once by the caller.

Floor 0: torch and nothing else, no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from . import layout

# A program is a single warp, which needs no shared memory and no barrier to reduce a tile over its positions, and takes
# few channels, to have more positions of each.
OPTIONS = {**layout.OPTIONS, "num_warps": 1}


@dataclass(frozen=True)  # without slots: what every launch asks for is computed once
class Plan:
    """The index map of one tensor, and the tile that one program takes.

    Attributes:
        outer: Number of slabs of rows by cols.
        rows: Rows of a slab: channels, or positions where ``channels_last``.
        cols: Contiguous elements of a row: positions, or channels where ``channels_last``.
        outer_stride: Elements between slabs of the input; the output is dense.
        row_stride: Elements between rows of the input.
        channels_last: Whether channels run along the columns.
        vector: Power of two that divides cols and both strides, up to 128 bits of elements. Kernels take the
            three in units of it, which is how the compiler knows that 128-bit accesses are aligned.
        block_rows: Rows of a tile, a power of two.
        block_cols: Columns of a tile, a power of two.
        wide: Whether offsets need 64 bits.
    """

    outer: int
    rows: int
    cols: int
    outer_stride: int
    row_stride: int
    channels_last: bool
    vector: int
    block_rows: int
    block_cols: int
    wide: bool

    @cached_property
    def row_blocks(self) -> int:
        """Tiles along the rows of a slab."""
        return _blocks(self.rows, self.block_rows)

    @cached_property
    def col_blocks(self) -> int:
        """Tiles along a row."""
        return _blocks(self.cols, self.block_cols)

    @cached_property
    def tiles_per_channel(self) -> int:
        """Tiles that one channel is spread over."""
        return self.outer * (self.row_blocks if self.channels_last else self.col_blocks)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, and cols, outer stride and row stride in units of ``vector``."""
        return self.rows, self.cols // self.vector, self.outer_stride // self.vector, self.row_stride // self.vector

    @cached_property
    def constexprs(self) -> dict[str, int | bool]:
        """The compile-time arguments that every kernel takes."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "VECTOR": self.vector,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLS": self.block_cols,
            "WIDE": self.wide,
        }


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_two(size: int) -> int:
    """Return the least power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _block(size: int, limit: int) -> int:
    """Return the tile's extent along a dimension: large, with less than 15% of the last tile's lanes idle if it can be.

    Down to 64 elements, two 128-byte lines of float32, a row's part of a tile still fills whole cache lines.
    """
    candidates = [limit >> k for k in range(limit.bit_length()) if limit >> k >= 64] or [limit]
    if size <= candidates[-1]:
        return min(_power_of_two(size), limit)
    padded = {block: _blocks(size, block) * block for block in candidates}
    return next((b for b in candidates if padded[b] <= 1.15 * size), min(candidates, key=lambda b: (padded[b], -b)))


def _collapse(dims: Sequence[tuple[int, int]], groups: int) -> list[tuple[int, int]] | None:
    """Return (size, stride) pairs, outermost first, merged into at most ``groups``; None if they do not merge so."""
    merged = layout.merged_dims(dims)
    return merged if len(merged) <= groups else None


def _index_map(
    shape: Sequence[int], strides: Sequence[int], dense: Sequence[int], channel_dim: int
) -> tuple[int, int, int, int, int, bool] | None:
    """Return outer, rows, cols, outer stride, row stride and channels_last; None where x must be copied first."""
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -dense[d])
    dims = [(shape[d], strides[d]) for d in order]
    if channel_dim not in order:  # one channel: slabs of a single row
        merged = _collapse(dims, 2)
        if merged is None or (merged and merged[-1][1] != 1):
            return None
        cols = merged[-1][0] if merged else 1
        outer, outer_stride = merged[0] if merged and len(merged) > 1 else (1, cols)
        return outer, 1, cols, outer_stride, cols, False
    at = order.index(channel_dim)
    channels, channel_stride = dims[at]
    outside, inside = _collapse(dims[:at], 2), _collapse(dims[at + 1 :], 1)
    if outside is None or inside is None or (inside[0] if inside else dims[at])[1] != 1:
        return None
    if inside:
        if len(outside) > 1:
            return None
        cols = inside[0][0]
        outer, outer_stride = outside[0] if outside else (1, channels * cols)
        return outer, channels, cols, outer_stride, channel_stride, False
    rows, row_stride = outside[-1] if outside else (1, channels)
    outer, outer_stride = outside[0] if len(outside) > 1 else (1, rows * row_stride)
    return outer, rows, channels, outer_stride, row_stride, True


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dense: tuple[int, ...],
    channel_dim: int,
    itemsize: int,
) -> Plan | None:
    """Return how to walk a tensor of these strides into a dense output; None where it must be copied first.

    Args:
        shape: Of the tensor, no size zero.
        strides: Of the input, in elements.
        dense: Strides of the output, which is dense in the input's memory format.
        channel_dim: Dimension that holds the channels.
        itemsize: Bytes of an element.
    """
    index_map = _index_map(shape, strides, dense, channel_dim)
    if index_map is None:
        return None
    outer, rows, cols, outer_stride, row_stride, channels_last = index_map
    vector = 16 // itemsize
    while cols % vector or outer_stride % vector or row_stride % vector:
        vector //= 2
    # Four 128-bit loads in flight for a thread, eight in float32 (on sm_90 18 instructions an element instead of 25).
    limit = 32 * 32
    block_cols = _block(cols, 64 if channels_last else limit)
    block_rows = min(_power_of_two(rows), limit // block_cols)
    reach = max(prod(shape), (outer - 1) * outer_stride + (rows - 1) * row_stride + cols) + limit
    return Plan(*index_map, vector, block_rows, block_cols, reach > layout.INT32_ELEMENTS)


def planned(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Plan]:
    """Return x (copied if no map fits it), an empty output in its memory format, and the plan.

    Raises:
        TypeError: If x is not float32, float16 or bfloat16; float64 is computed by `reference`.
    """
    if x.dtype not in layout.DTYPES:
        raise TypeError(f"the Triton kernels take float32, float16 or bfloat16, not {x.dtype}")
    y = torch.empty_like(x)
    found = plan(x.shape, x.stride(), y.stride(), channel_dim, x.element_size())
    if found is None:
        x = torch.empty_like(y).copy_(x)
        found = plan(x.shape, x.stride(), y.stride(), channel_dim, x.element_size())
        assert found is not None, "a dense tensor fits one of the two maps"
    return x, y, found


def vector_of_channels(vector: Tensor | None, channels: int, name: str) -> Tensor | None:
    """Return a contiguous ``[C]``; raises ValueError for another size, which a kernel would read out of bounds."""
    if vector is not None and vector.numel() != channels:
        raise ValueError(f"{name} has {vector.numel()} elements for {channels} channels")
    return None if vector is None else vector.contiguous()
