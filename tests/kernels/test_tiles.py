"""How the kernels of the moments walk tensors: which as they lie, in tiles of which form, and where 64 bits begin."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from meansparse_fx.kernels.moments import TILE, Tiles, tiles_of

X = torch.empty(4, 6, 8, 10)
CHANNELS_LAST = X.contiguous(memory_format=torch.channels_last)
TOKENS = torch.empty(4, 80, 6)


def walked(x: torch.Tensor, channel_dim: int) -> Tiles | None:
    return tiles_of(tuple(x.shape), x.stride(), torch.empty_like(x).stride(), channel_dim, x.element_size())


AS_THEY_LIE = {  # outer, rows, cols, channels_last
    "contiguous": (X, 1, (4, 6, 80, False)),
    "channels_last": (CHANNELS_LAST, 1, (1, 320, 6, True)),
    "tokens": (TOKENS, 2, (1, 320, 6, True)),
    "matrix": (torch.empty(4, 6), 1, (1, 4, 6, True)),
    "channels first": (X, 0, (1, 4, 480, False)),
    "one channel": (torch.empty(4, 1, 8, 10), 1, (1, 1, 320, False)),
    "a slice of the channels": (X[:, 1:4], 1, (4, 3, 80, False)),
    "a slice of the tokens": (TOKENS[:, 1:], 2, (4, 79, 6, True)),
    "some images": (X[::2], 1, (2, 6, 80, False)),
}


@pytest.mark.parametrize("name", AS_THEY_LIE)
def test_walked_without_a_copy(name) -> None:
    x, channel_dim, expected = AS_THEY_LIE[name]
    found = walked(x, channel_dim)
    assert (found.outer, found.rows, found.cols, found.channels_last) == expected


@pytest.mark.parametrize("x", [X[..., 1:], X[..., ::2], CHANNELS_LAST[:, :4], X[:, :1].expand(X.shape)])
def test_copied_once(x) -> None:
    assert walked(x, 1) is None
    assert walked(torch.empty_like(x), 1) is not None


@pytest.mark.parametrize(("itemsize", "widest"), [(4, 4), (2, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [7, 14, 28, 56])
@pytest.mark.parametrize("channels", [64, 160, 2048])
def test_vectors_divide_rows_and_idle_lanes_are_few(channels, size, memory_format, itemsize, widest) -> None:
    x = torch.empty(8, channels, size, size, device="meta").contiguous(memory_format=memory_format)
    found = tiles_of(tuple(x.shape), x.stride(), x.stride(), 1, itemsize)
    assert found.vector == min(widest, found.cols & -found.cols)
    assert found.block_rows * found.block_cols == TILE
    assert -(-found.cols // found.block_cols) * found.block_cols <= 1.31 * found.cols


@pytest.mark.parametrize(("shape", "wide"), [((2**11, 2**10, 2**9), False), ((2**11, 2**10, 2**10), True)])
def test_offsets_widen_before_they_overflow(shape, wide) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    assert tiles_of(tuple(shape), x.stride(), x.stride(), 1, 2).wide is wide
