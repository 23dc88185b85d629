"""How the operator's kernels walk a tensor: as vectors of 16 bytes, whose channels are arithmetic on their index.

A dense tensor is n elements in the order of its memory, whatever its memory format: the channel of element i is
``i // inner % channels``, with inner = H * W for N,C,H,W and 1 for channels-last and tokens. Slices of the outer
dimensions are walked as they lie, by an outer stride; what is not dense otherwise is copied once by the caller.
Divisors reach a kernel as a multiplier and a shift, so that no size is compiled in.

Floor 0: torch and nothing else, no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Two vectors a thread. On an H200 neither 512 vectors, nor 8 warps, nor twice the vector were faster throughout.
VECTORS, WARPS = 256, 4
# fp fusion is said aloud, because Triton 3.10 turns its default off and 3.9 warns of it.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
INT32_ELEMENTS = 2**31 - 1
_LARGEST = 2**31 - 2 * VECTORS  # vectors that 32 bits count


@dataclass(frozen=True, slots=True)
class Layout:
    """How a kernel walks one tensor.

    Attributes:
        grid: Programs, of `VECTORS` vectors each.
        sizes: The kernel's integer arguments: whole vectors, elements beyond them, then divisor, multiplier and shift
            of the period after which channels repeat, of inner, and of the slab that lies dense, then the stride of
            slabs. In units of vectors where all of them are whole vectors.
        vector: Elements of a vector, a power of two.
        channels: Which channels a vector has: ``one`` (of all), ``vector`` (one for each), ``columns`` (contiguous
            ones), ``pair`` (one or two), ``wrap`` and ``each`` (any).
        strided: x is slabs with gaps between them.
        wide: Offsets need 64 bits.
        within_2gb: No byte of x or of the results lies further out, which compilers for AMD ask.
    """

    grid: int
    sizes: tuple[int, ...]
    vector: int
    channels: str
    strided: bool
    wide: bool
    within_2gb: bool

    @property
    def constexprs(self) -> dict[str, int | bool | str]:
        """The compile-time arguments that both kernels take."""
        return {
            "CHANNELS": self.channels, "STRIDED": self.strided, "WIDE": self.wide, "TAIL": self.sizes[1] > 0,
            "V": self.vector, "VECTORS": VECTORS,
        }  # fmt: skip


def divider(divisor: int) -> tuple[int, int, int]:
    """Return a divisor of at least 2 with multiplier and shift: n // divisor = (n * multiplier >> 32) >> shift.

    Zeros for 0, by which no kernel divides.

    Exact for 0 <= n < 2^31: with 2^l >= divisor > 2^(l - 1), the multiplier is 2^(31 + l) / divisor rounded up by
    e / divisor, e < divisor, and n * e < 2^(31 + l).

    Example:
        >>> divisor, multiplier, shift = divider(49)
        >>> all((n * multiplier >> 32) >> shift == n // 49 for n in (0, 48, 49, 97, 98, 2**31 - 1))
        True
    """
    if divisor == 0:
        return 0, 0, 0
    bits = (divisor - 1).bit_length()
    return divisor, -(-(2 ** (31 + bits)) // divisor), bits - 1


def _channels_of(inner: int, channels: int, vector: int) -> tuple[str, int, int]:
    """Return which channels a vector has, the period, and inner, in the units in which a kernel divides by them."""
    if channels == 1:
        return "one", 0, 0
    if inner % vector == 0 and inner > vector:
        return "vector", inner * channels // vector, inner // vector
    if inner == 1 and channels % vector == 0 and channels > vector:
        return "columns", channels // vector, 0
    if inner == 1:
        return "wrap", channels, 0
    return ("pair" if inner >= vector else "each"), inner * channels, inner


@lru_cache(maxsize=4096)
def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], dense: tuple[int, ...], channel_dim: int, itemsize: int
) -> Layout | None:
    """Return how to walk a tensor of these strides into a dense output; None where it must be copied first.

    Args:
        shape: Of the tensor, no size zero.
        strides: Of the input, in elements.
        dense: Strides of the output, which is dense in the input's memory format.
        channel_dim: Dimension that holds the channels.
        itemsize: Bytes of an element.
    """
    slabs = slabs_of(shape, strides, dense)
    if slabs is None:
        return None
    slab, outer_stride = slabs
    count, channels = torch.Size(shape).numel(), shape[channel_dim]
    inner = dense[channel_dim] if channels > 1 else count
    strided, vector = slab < count, 16 // itemsize
    while strided and (slab % vector or outer_stride % vector or slab == vector):
        vector //= 2
    kind, period, inner = _channels_of(inner, channels, vector)
    whole, tail = divmod(count, vector)
    reach = max(count, (count // slab - 1) * outer_stride + slab if strided else 0)
    dividers = [divider(size) for size in (period, inner, slab // vector if strided else 0)]
    return Layout(
        grid=max(-(-whole // VECTORS), 1),
        sizes=(whole, tail, *dividers[0], *dividers[1], *dividers[2], outer_stride // vector if strided else 0),
        vector=vector,
        channels=kind,
        strided=strided,
        wide=reach + VECTORS * vector > INT32_ELEMENTS,
        within_2gb=reach * itemsize < 2**31,
    )


def fits(layout: Layout) -> bool:
    """Return whether a kernel can count what it walks: beyond some 8 thousand million elements it cannot."""
    whole, _, period, *_ = layout.sizes
    return whole < _LARGEST and period * layout.vector < 2**31


def slabs_of(shape: Sequence[int], strides: Sequence[int], dense: Sequence[int]) -> tuple[int, int] | None:
    """Return the size of what lies dense and the stride between such slabs; None unless there are only those."""
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for d in sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -dense[d]):
        if merged and merged[-1][1] == shape[d] * strides[d]:
            merged[-1] = (merged[-1][0] * shape[d], strides[d])
        else:
            merged.append((shape[d], strides[d]))
    if not merged:
        return 1, 1
    slab, step = merged[-1]
    return None if len(merged) > 2 or step != 1 else (slab, merged[0][1])


def expanded_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``tensor`` in a shape that it broadcasts to.

    Raises:
        ValueError: It does not, and a kernel would read beyond it.
    """
    if tensor.shape == shape:
        return tensor
    try:
        return tensor.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} beside one of shape {list(shape)}: it must have that shape or "
            "broadcast to it"
        ) from error


def is_laid_out_like(tensor: Tensor, y: Tensor) -> bool:
    """Return whether two tensors have one shape, and their elements the same places."""
    pairs = zip(tensor.stride(), y.stride(), y.shape, strict=True)
    return tensor.shape == y.shape and all(a == b for a, b, n in pairs if n > 1)


def laid_out_like(tensor: Tensor, y: Tensor) -> Tensor:
    """Return ``tensor`` in the shape and memory layout of ``y``, copied only if it differs.

    Raises:
        ValueError: It does not broadcast to y's shape.
    """
    tensor = expanded_to(tensor, y.shape)
    return tensor if is_laid_out_like(tensor, y) else torch.empty_like(y, dtype=tensor.dtype).copy_(tensor)
