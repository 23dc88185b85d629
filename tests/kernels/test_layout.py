"""How the kernels walk tensors: which layouts as they lie, which channel each element gets, and where 64 bits begin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meansparse_fx.kernels.layout import VECTORS, Layout, divider, fits, is_laid_out_like, laid_out_like, layout_of

X = torch.empty(4, 6, 8, 10)
CHANNELS_LAST = torch.empty(4, 6, 8, 10).contiguous(memory_format=torch.channels_last)
CHANNELS_LAST_3D = torch.empty(2, 6, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
TOKENS = torch.empty(4, 80, 6)
WIDE_TOKENS = torch.empty(4, 80, 12)


def walked(x: torch.Tensor, channel_dim: int) -> Layout | None:
    dense = torch.empty_like(x)
    return layout_of(tuple(x.shape), x.stride(), dense.stride(), channel_dim, x.element_size())


AS_THEY_LIE = {  # which channels a vector has, whether x lies in slabs, elements of a vector
    "contiguous": (X, 1, ("vector", False, 4)),
    "channels_last": (CHANNELS_LAST, 1, ("wrap", False, 4)),
    "channels_last_3d": (CHANNELS_LAST_3D, 1, ("wrap", False, 4)),
    "tokens": (TOKENS, 2, ("wrap", False, 4)),
    "tokens transposed": (TOKENS.transpose(1, 2), 1, ("wrap", False, 4)),
    "tokens, whole vectors": (WIDE_TOKENS, 2, ("columns", False, 4)),
    "matrix": (torch.empty(4, 12), 1, ("columns", False, 4)),
    "channels first": (X, 0, ("vector", False, 4)),
    "no positions": (torch.empty(4, 6, 1, 1), 1, ("wrap", False, 4)),
    "7x7": (torch.empty(4, 6, 7, 7), 1, ("pair", False, 4)),
    "7x7, half precision": (torch.empty(4, 6, 7, 7, dtype=torch.bfloat16), 1, ("pair", False, 8)),
    "2x2": (torch.empty(4, 6, 2, 2), 1, ("pair", False, 4)),
    "2x2, half precision": (torch.empty(4, 6, 2, 2, dtype=torch.bfloat16), 1, ("each", False, 8)),
    "one channel": (torch.empty(4, 1, 8, 10), 1, ("one", False, 4)),
    "a slice of the channels": (X[:, 1:4], 1, ("vector", True, 4)),
    "one of the channels": (X[:, 1:2], 1, ("one", True, 4)),
    "some images": (X[::2], 1, ("vector", True, 4)),
    "a slice of the tokens": (TOKENS[:, 1:], 2, ("columns", True, 2)),
    "a slice of the channels, last": (CHANNELS_LAST[:, :4], 1, ("columns", True, 2)),
    "one image for all": (X[:1].expand(4, 6, 8, 10), 1, ("vector", True, 4)),
    "rows with a gap": (X[..., 1:], 1, ("vector", True, 1)),
}


@pytest.mark.parametrize("name", AS_THEY_LIE)
def test_walked_without_a_copy(name) -> None:
    x, channel_dim, expected = AS_THEY_LIE[name]
    found = walked(x, channel_dim)
    assert (found.channels, found.strided, found.vector) == expected


@pytest.mark.parametrize(
    "x", [X[..., ::2], X[:, :, 1:, :3], X[..., :1].expand(4, 6, 8, 10), X[:, :1].expand(4, 6, 8, 10)]
)
def test_copied_once(x) -> None:
    assert walked(x, 1) is None
    assert walked(torch.empty_like(x), 1) is not None


@st.composite
def tensors(draw) -> tuple[torch.Tensor, int]:
    """A tensor whose values are the places of its elements, with its dimensions in any order and one of them cut."""
    dims = draw(st.integers(2, 4))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 16]), min_size=dims, max_size=dims))
    x = torch.arange(math.prod(sizes)).view(sizes).permute(draw(st.permutations(range(dims))))
    dim, start, step = draw(st.integers(0, dims - 1)), draw(st.integers(0, 4)), draw(st.integers(1, 2))
    x = x.movedim(dim, 0)[min(start, x.shape[dim] - 1) :: step].movedim(0, dim)
    return x, draw(st.integers(0, dims - 1))


@given(tensors(), st.sampled_from([2, 4]))
def test_every_element_has_its_place_and_its_channel(tensor, itemsize) -> None:
    """As the kernels compute them, from the vector and the element within it."""
    x, dim = tensor
    in_memory = torch.empty_like(x).copy_(x).as_strided((x.numel(),), (1,))
    channel = torch.arange(x.shape[dim]).view([-1 if d == dim else 1 for d in range(x.dim())])
    channel = torch.empty_like(x).copy_(channel.expand_as(x)).as_strided((x.numel(),), (1,))
    strides = torch.empty_like(x).stride()
    found = layout_of(tuple(x.shape), x.stride(), strides, dim, itemsize)
    if found is None:  # and once it is copied there is one
        in_memory = torch.arange(x.numel())
        found = layout_of(tuple(x.shape), strides, strides, dim, itemsize)
    whole, tail, period, _, _, inner, _, _, slab, _, _, outer_stride = found.sizes
    element = torch.arange(x.numel())
    vector, lane = element // found.vector, element % found.vector
    assert (whole * found.vector + tail, tail < found.vector) == (x.numel(), True)
    assert found.grid * VECTORS >= whole
    place = vector // slab * outer_stride + vector % slab if found.strided else vector
    assert torch.equal(place * found.vector + lane, in_memory - in_memory[0])
    match found.channels:
        case "one":
            walked = torch.zeros_like(element)
        case "vector":
            walked = vector % period // inner
        case "columns":
            walked = vector % period * found.vector + lane
        case "wrap":
            walked = element % period
        case "pair" | "each":
            walked = element % period // inner
    assert torch.equal(walked, channel)
    if found.channels == "pair":
        assert inner >= found.vector, "or a vector could have three channels"


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [7, 8, 14, 28, 56])
@pytest.mark.parametrize("channels", [64, 160, 2048])
def test_accesses_of_real_models_are_16_bytes_wide(channels, size, memory_format, itemsize) -> None:
    """And no vector there has more than two channels that do not lie side by side."""
    x = torch.empty(8, channels, size, size, device="meta").contiguous(memory_format=memory_format)
    found = layout_of(tuple(x.shape), x.stride(), x.stride(), 1, itemsize)
    assert found.vector * itemsize == 16
    assert found.channels in ("vector", "columns", "pair")


def test_a_dynamic_batch_compiles_nothing() -> None:
    found = {walked(torch.empty(n, 64, 14, 14), 1).constexprs.__repr__() for n in (1, 2, 3, 64, 100)}
    assert len(found) == 1
    sizes = {walked(torch.empty(8, c, s, s), 1).constexprs.__repr__() for c in (64, 65, 256) for s in (8, 14, 56)}
    assert sizes == found


@given(st.integers(2, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_division_by_a_product_is_exact(divisor, n) -> None:
    _, multiplier, shift = divider(divisor)
    assert multiplier < 2**32
    for value in (n, n - n % divisor, max(n - n % divisor - 1, 0), 2**31 - 1):
        assert (value * multiplier >> 32) >> shift == value // divisor


@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        *(((2**11, 2**10, 2**9), False), ((2**11, 2**10, 2**10), True), ((1, 1, 2**33), True)),
        # A program of 256 vectors of 8 elements may begin at the very end.
        *(((1, 1, 2**31 - 1 - 2048), False), ((1, 1, 2**31 - 2048), True)),
    ],
)
def test_offsets_widen_before_they_overflow(shape, wide) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    found = layout_of(shape, x.stride(), x.stride(), 1, 2)
    assert found.wide is wide
    assert found.grid < 2**31  # of one launch
    assert fits(found)


def test_a_slice_of_a_huge_tensor_widens() -> None:
    x = torch.empty(2**11, 2**10, 2**11, device="meta")[:, :8]
    y = torch.empty_like(x)
    assert y.numel() < 2**31
    found = layout_of(tuple(x.shape), x.stride(), y.stride(), 1, 4)
    assert (found.wide, found.within_2gb) == (True, False)


def test_what_no_kernel_can_count_is_left_to_torch() -> None:
    x = torch.empty(2**12, 2**12, 2**10, device="meta", dtype=torch.float16)  # 2^34 elements in 2^31 vectors
    assert not fits(layout_of(tuple(x.shape), x.stride(), x.stride(), 1, 2))


@pytest.mark.parametrize("y", [X, CHANNELS_LAST], ids=["rows", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 6, 8, 10), (4, 6, 8, 10), (6, 1, 1)], ids=str)
def test_what_a_kernel_reads_beside_x_has_all_its_elements(shape, y) -> None:
    tensor = torch.rand(shape)
    found = laid_out_like(tensor, y)
    assert found.stride() == y.stride()
    assert torch.equal(found, tensor.expand_as(y))
    assert (found is tensor) == (shape == y.shape and y is X) == is_laid_out_like(tensor, y)


def test_strides_of_single_elements_say_nothing() -> None:
    pooled, other = torch.rand(4, 6, 1, 1), torch.rand(4, 6, 1, 1).as_strided((4, 6, 1, 1), (6, 1, 7, 9))
    assert laid_out_like(other, pooled) is other


@pytest.mark.parametrize("shape", [(3, 6, 8, 10), (4, 6, 80)], ids=str)
def test_what_does_not_broadcast_is_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"beside one of shape \[4, 6, 8, 10\]"):
        laid_out_like(torch.rand(shape), X)
