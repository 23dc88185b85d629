"""The lowering for large CPU tensors: the eager composition compiled by Inductor into one loop.

torch's CPU comparisons and `where` take most of what the composition costs; one loop costs little more than the
activation alone, where the composition costs several times as much (docs/kernels.md has the table). Compiled once
for each activation, direction and layout, sizes dynamic, kept on disk by Inductor. Which tensors come here
depends on their size alone, so that a result never depends on timing.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from . import eager
from .direct import Direct, Known
from .layout import laid_out_like
from .records import Options, Vectors

MIN_ELEMENTS = 1 << 13  # below, torch operators are about as fast, and there is nothing to compile

# By everything a call depends on: what `on_views` did, and the shape and strides of the views.
_SEEN: dict[Hashable, tuple[Known, Sequence[int], Sequence[int]]] = {}
_SEEN_LIMIT = 4096  # of shapes, for a model that sees ever new ones

_LOGGER = logging.getLogger("meansparse_fx.kernels")


@functools.cache
def available() -> bool:
    """Return whether Inductor finds a C++ compiler."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        _LOGGER.info("no C++ compiler for the CPU kernels (%s): using torch operators", error)
        return False
    return True


def flatten(x: Tensor, channel_dim: int) -> Tensor | None:
    """Return x viewed as ``[outer, C, inner]`` or, channels innermost, as ``[rows, C]``; None if no view fits."""
    channels = x.shape[channel_dim]
    if x.is_contiguous():
        inner = math.prod(x.shape[channel_dim + 1 :])
        return x.view(-1, channels) if inner == 1 else x.view(-1, channels, inner)
    moved = x.movedim(channel_dim, -1)
    return moved.view(-1, channels) if moved.is_contiguous() else None


def unflatten(flat: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """Return a result of `flatten`'s shape with the shape and memory format of ``like``."""
    if like.is_contiguous():
        return flat.view(like.shape)
    return flat.view(like.movedim(channel_dim, -1).shape).movedim(-1, channel_dim)


def takes(x: Tensor, channel_dim: int, weight: Tensor | None) -> bool:
    """Return whether this lowering handles x; a learned slope is left to the eager one."""
    large = weight is None and x.numel() >= MIN_ELEMENTS
    return large and (x.is_contiguous() or flatten(x, channel_dim) is not None) and available()


def forward(x: Tensor, vectors: Vectors, options: Options) -> Tensor:
    """Return act(s(x)); arguments as in `eager.forward`."""
    (y,) = on_views(eager.forward, (x,), x, vectors, options._replace(backward="exact"))
    return y


def backward(grad: Tensor, x: Tensor, vectors: Vectors, options: Options) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and an empty one for the weight."""
    grad_x, grad_weight = on_views(eager.backward, (grad, x), x, vectors, options)
    return grad_x, grad_weight


def on_views(
    plain: Callable, tensors: Sequence[Tensor | None], x: Tensor, vectors: Vectors, options: Options
) -> list[Tensor]:
    """Return the results of ``plain(*tensors, vectors, options)``, compiled.

    Args:
        plain: What to compile, for the channels in the middle or innermost.
        tensors: Shaped like x, or None; x is one of them, and ``plain`` says which.
        x: Whose layout the results get, those of its size.
        vectors: Per channel.
        options: Everything else.
    """
    case = plain, options, torch.get_num_threads(), *map(_layout, tensors), *map(_layout, vectors)
    if (seen := _SEEN.get(case)) is not None:
        known, shape, stride = seen
        flat = [t if t is None else t.as_strided(shape, stride) for t in tensors]
        results = known.call((*flat, *vectors))
        return [r.as_strided(x.shape, x.stride()) if r.numel() == x.numel() else r for r in results]

    dim = options.channel_dim
    alike = [t if t is None or t is x else laid_out_like(t, x) for t in tensors]
    flat = [t if t is None else flatten(t, dim) for t in alike]
    dense = [v if v is None else v.contiguous() for v in vectors]
    call = kernel(plain, len(flat), options._replace(channel_dim=1))
    found = call(*flat, *dense)
    known = call.known(*flat, *dense)
    given, used = (*tensors, *vectors), (*alike, *dense)
    if known is not None and all(a is b for a, b in zip(given, used, strict=True)):
        like = flatten(x, dim)
        if len(_SEEN) >= _SEEN_LIMIT:
            _SEEN.clear()
        _SEEN[case] = known, like.shape, like.stride()
    return [unflatten(r, x, dim) if r.numel() == x.numel() else r for r in found]


def _layout(t: Tensor | None) -> Hashable:
    return t if t is None else (t.shape, t.stride(), t.dtype)


@functools.cache
def kernel(plain: Callable, count: int, options: Options) -> Direct:
    """Return the compiled form of ``plain(*tensors, vectors, options)``: from tensors and vectors to a tuple.

    Args:
        count: How many tensors come before the vectors.
    """

    def call(*arguments):
        found = plain(*arguments[:count], Vectors(*arguments[count:]), options)
        return (found,) if isinstance(found, Tensor) else found

    name = f"mean_sparse_{plain.__module__.rpartition('.')[2]}_{plain.__name__}_{options.activation}"
    return Direct(call, name)
