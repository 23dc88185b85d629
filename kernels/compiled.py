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
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from . import eager

MIN_ELEMENTS = 1 << 16  # below, the compiled call's own 50 microseconds cost more than it saves

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
    return x.numel() >= MIN_ELEMENTS and weight is None and flatten(x, channel_dim) is not None and available()


def forward(
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    weight: None,
    channel_dim: int,
    activation: str,
    constants: Sequence[float],
    variant: str,
    steepness: float,
) -> Tensor:
    """Return act(s(x)); arguments as in `reference.mean_sparse`."""
    call = kernel(eager.forward, activation, x.dim() > 2, 1, activation, tuple(constants), variant, steepness)
    with torch.no_grad():
        return unflatten(call(flatten(x.detach(), channel_dim), centre, threshold, None), x, channel_dim)


def backward(
    grad: Tensor,
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    weight: None,
    channel_dim: int,
    activation: str,
    constants: Sequence[float],
    variant: str,
    backward: str,
    steepness: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and an empty one for the weight."""
    flat_grad, flat = flatten(laid_out_like(grad, x), channel_dim), flatten(x.detach(), channel_dim)
    options = (1, activation, tuple(constants), variant, backward, steepness)
    call = kernel(eager.backward, activation, x.dim() > 2, *options)
    with torch.no_grad():
        grad_x, grad_weight = call(flat_grad, flat, centre, threshold, None)
    return unflatten(grad_x, x, channel_dim), grad_weight


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """Return t with the strides of x, copied if it has others."""
    return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)


@functools.cache
def kernel(plain: Callable, label: str, case: Hashable, *options) -> Callable:
    """Return the compiled form of ``plain(*tensors, *options)``.

    Args:
        label: For the log and for profiles: the activation.
        case: What else gets code of its own, such as the number of dimensions.
    """
    name = f"mean_sparse_{plain.__name__}_{label}"

    def call(*tensors):
        return plain(*tensors, *options)

    # Dynamo keeps its cache, and counts recompilations, by code object: give each kernel its own.
    call.__code__ = call.__code__.replace(co_name=name)
    compiled = torch.compile(call, dynamic=True, fullgraph=True)

    def guarded(*tensors):
        nonlocal compiled
        if compiled is not call:
            try:
                return compiled(*tensors)
            except Exception as error:  # a broken toolchain shows only here
                warnings.warn(f"compiling the CPU kernel failed, using torch operators: {error}", stacklevel=2)
                compiled = call
        return call(*tensors)

    _LOGGER.info("compiling the CPU kernel %s", name)
    return guarded
