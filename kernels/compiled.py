"""The lowering for large CPU tensors: the composition compiled by Inductor into one loop.

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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import composition
from .composition import Wanted
from .layout import is_laid_out_like, laid_out_like
from .records import Options, Results, Runner, Vectors
from .reference import folded
from .unguarded import Unguarded

MIN_ELEMENTS = 1 << 13  # below, torch operators are about as fast, and there is nothing to compile

_LOGGER = logging.getLogger("meansparse_fx.kernels")


@functools.cache
def available() -> bool:
    """Return whether Inductor finds a C++ compiler."""
    # Said by torch when it looks for compilers on a machine without a GPU, which is no news for CPU kernels.
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.msg)
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


def takes(x: Tensor, channel_dim: int, weight: Tensor | None = None, at_least: int = MIN_ELEMENTS) -> bool:
    """Return whether this lowering handles x; a learned slope is left to torch operators."""
    return weight is None and x.numel() >= at_least and flatten(x, channel_dim) is not None and available()


def forward_runner(
    vectors: Vectors, options: Options, x: Tensor, residual: Tensor | None, shortcut: Tensor | None
) -> Runner:
    """Return ``(vectors, x, residual, shortcut) -> (y, v)`` for tensors like these."""
    options = options._replace(backward="exact", backward_steepness=10.0)  # which values do not depend on
    return _on_views(composition.forward, (), (x, residual, shortcut), vectors, options)


def backward_runner(
    vectors: Vectors,
    options: Options,
    x: Tensor,
    grad: Tensor,
    grad_sum: Tensor | None,
    residual: Tensor | None,
    from_sum: bool,
    wanted: Wanted,
) -> Runner:
    """Return ``(vectors, x, grad, grad_sum, residual) -> (grad_x, grad_v)`` for tensors like these."""
    return _on_views(composition.backward, (from_sum, wanted), (x, grad, grad_sum, residual), vectors, options)


def _on_views(
    plain: Callable, rest: tuple, tensors: Sequence[Tensor | None], vectors: Vectors, options: Options
) -> Runner:
    """Return ``(vectors, *tensors) -> results``: those of ``plain(*tensors, vectors, options, *rest)``, compiled.

    Args:
        plain: What to compile, for the channels in the middle or innermost.
        tensors: Of one shape, or None; the results get the layout of the first.
    """
    x = tensors[0]
    view, whole, strides = flatten(x, options.channel_dim), x.shape, x.stride()
    shape, stride = view.shape, view.stride()
    kernel = _kernel(plain, rest, len(tensors), options._replace(channel_dim=1))
    copies = any(t is not None and not is_laid_out_like(t, x) for t in tensors)
    gathers = vectors.gapped
    calls: dict[int, Callable[[Sequence[Tensor | None]], Sequence[Tensor]]] = {}  # compiled for so many threads

    def run(vectors: Vectors, *tensors: Tensor | None) -> Results:
        if copies:
            tensors = tuple([t if t is None else laid_out_like(t, tensors[0]) for t in tensors])
        if gathers:
            vectors = vectors.contiguous()
        vectors = folded(vectors, options)  # in the loop, it took up to 0.7 of the loop's time again
        arguments = [*[t if t is None else t.as_strided(shape, stride) for t in tensors], *vectors]
        call = calls.get(threads := torch.get_num_threads())
        if call is None:
            call = calls[threads] = kernel.compiled_for(arguments)
        first, *second = call(arguments)
        # In place: they are new, and autograd lets nobody write into a view that a Function returned.
        return first.as_strided_(whole, strides), second[0].as_strided_(whole, strides) if second else None

    return run


@functools.cache
def _kernel(plain: Callable, rest: tuple, count: int, options: Options) -> Unguarded:
    """Return the compiled form of ``plain(*tensors, vectors, options, *rest)``: of tensors and vectors, to a tuple.

    Args:
        count: How many tensors come before the vectors.
    """

    def call(*arguments):
        found = plain(*arguments[:count], Vectors(*arguments[count:]), options, *rest)
        return tuple([t for t in found if t is not None])

    return Unguarded(call, f"mean_sparse_{plain.__name__}_{options.activation}")
