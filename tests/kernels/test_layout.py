"""The index maps: which layouts are walked as they lie, how they are tiled, and where 64-bit offsets begin."""

from __future__ import annotations

import pytest
import torch

from meansparse_fx.kernels.layout import laid_out_like, plan, planned

X = torch.empty(4, 6, 8, 10)
CHANNELS_LAST = torch.empty(4, 6, 8, 10).contiguous(memory_format=torch.channels_last)
TOKENS = torch.empty(4, 80, 6)

MAPS = {  # outer, rows, cols, channels_last
    "contiguous": (X, 1, (4, 6, 80, False)),
    "channels_last": (CHANNELS_LAST, 1, (1, 320, 6, True)),
    "channels_last_3d": (
        torch.empty(2, 6, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
        1,
        (1, 120, 6, True),
    ),
    "tokens": (TOKENS, 2, (1, 320, 6, True)),
    "tokens transposed": (TOKENS.transpose(1, 2), 1, (1, 320, 6, True)),
    "matrix": (torch.empty(4, 6), 1, (1, 4, 6, True)),
    "channels first": (X, 0, (1, 4, 480, False)),
    "no positions": (torch.empty(4, 6, 1, 1), 1, (1, 4, 6, True)),
    "one channel": (torch.empty(4, 1, 8, 10), 1, (1, 1, 320, False)),
    "a slice of the channels": (X[:, 1:4], 1, (4, 3, 80, False)),
    "one of the channels": (X[:, 1:2], 1, (4, 1, 80, False)),
    "some images": (X[::2], 1, (2, 6, 80, False)),
    "a slice of the tokens": (TOKENS[:, 1:], 2, (4, 79, 6, True)),
    "a slice of the channels, last": (CHANNELS_LAST[:, :4], 1, (1, 320, 4, True)),
    "one image for all": (X[:1].expand(4, 6, 8, 10), 1, (4, 6, 80, False)),
    "one channel for all": (X[:, :1].expand(4, 6, 8, 10), 1, (4, 6, 80, False)),
}


@pytest.mark.parametrize("name", list(MAPS))
def test_walked_without_a_copy(name) -> None:
    x, channel_dim, expected = MAPS[name]
    walked, y, found = planned(x, channel_dim)
    assert walked is x
    assert (found.outer, found.rows, found.cols, found.channels_last) == expected
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("x", [X[..., 1:], X[..., ::2], X[:, :, 1:, :3], X[..., :1].expand(4, 6, 8, 10)])
def test_copied_once(x) -> None:
    walked, y, _ = planned(x, 1)
    assert walked is not x
    assert walked.stride() == y.stride()


@pytest.mark.parametrize(
    ("shape", "wide"), [((2**11, 2**10, 2**9), False), ((2**11, 2**10, 2**10), True), ((1, 1, 2**33), True)]
)
def test_offsets_widen_before_they_overflow(shape, wide) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    found = plan(x.shape, x.stride(), x.stride(), 1, 2)
    assert found.wide is wide
    assert found.grid[0] < 2**31  # of one launch


def test_a_slice_of_a_huge_tensor_widens() -> None:
    x = torch.empty(2**11, 2**10, 2**11, device="meta")[:, :8]
    y = torch.empty_like(x)
    assert y.numel() < 2**31
    assert plan(x.shape, x.stride(), y.stride(), 1, 4).wide


@pytest.mark.parametrize(("itemsize", "widest"), [(4, 4), (2, 8)])
@pytest.mark.parametrize("size", [7, 14, 28, 56])
def test_vectors_divide_rows_and_idle_lanes_are_few(size, itemsize, widest) -> None:
    x = torch.empty(8, 64, size, size, device="meta")
    found = plan(x.shape, x.stride(), x.stride(), 1, itemsize)
    cols = size * size
    assert found.vector == min(widest, cols & -cols)
    assert found.block_rows * found.block_cols == (2048 if itemsize == 4 else 4096)
    assert found.col_blocks * found.block_cols <= 1.31 * cols


@pytest.mark.parametrize("y", [X, CHANNELS_LAST], ids=["rows", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 6, 8, 10), (4, 6, 8, 10), (6, 1, 1)], ids=str)
def test_what_a_kernel_reads_beside_x_has_all_its_elements(shape, y) -> None:
    tensor = torch.rand(shape)
    found = laid_out_like(tensor, y)
    assert found.stride() == y.stride()
    assert torch.equal(found, tensor.expand_as(y))
    assert (found is tensor) == (shape == y.shape and y is X)


@pytest.mark.parametrize("shape", [(3, 6, 8, 10), (4, 6, 80)], ids=str)
def test_what_does_not_broadcast_is_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"beside one of shape \[4, 6, 8, 10\]"):
        laid_out_like(torch.rand(shape), X)
