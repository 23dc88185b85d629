"""What runs calls of the operator on a GPU: layouts looked at once, results allocated, one kernel launched.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .composition import Wanted
from .device_activations import activation_constexprs
from .elementwise import backward_kernel, forward_kernel
from .layout import DTYPES, fits, is_laid_out_like, laid_out_like, layout_of
from .records import Options, Results, Runner, Vectors
from .triton_launch import Launch


def forward_runner(
    vectors: Vectors, options: Options, x: Tensor, residual: Tensor | None, shortcut: Tensor | None
) -> Runner | None:
    """Return ``(vectors, x, residual, shortcut) -> (y, v)`` for tensors like these; None beyond what a kernel counts.

    Args:
        options: Everything else. A v that is wanted is rounded to x's dtype first, and y is the function of that.
        x: float32, float16 or bfloat16, of any layout; copied at most once.
        residual, shortcut: Of x's shape, or broadcasting to it; copied if they lie otherwise.

    Raises:
        TypeError: If x is of another dtype; float64 is computed by torch operators.
    """
    constexprs = activation_constexprs(options.activation, options.constants, vectors.weight)
    constexprs |= {"VARIANT": options.variant}
    numbers = float(options.steepness), options.input_eps, options.sum_eps
    return _runner(forward_kernel, vectors, options, x, (residual, shortcut), options.want_sum, numbers, constexprs)


def backward_runner(
    vectors: Vectors,
    options: Options,
    x: Tensor,
    grad: Tensor,
    grad_sum: Tensor | None,
    residual: Tensor | None,
    from_sum: bool,
    wanted: Wanted,
) -> Runner | None:
    """Return ``(vectors, x, grad, grad_sum, residual) -> (grad_x, grad_v)``; None and errors as in `forward_runner`.

    Arguments as in `composition.backward`; the gradient of a learned slope is not computed.
    """
    constexprs = activation_constexprs(options.activation, options.constants, vectors.weight)
    constexprs |= {"VARIANT": options.variant, "BACKWARD": options.backward, "FROM_SUM": from_sum}
    numbers = float(options.steepness), float(options.gate_steepness or 0.0), options.input_eps, options.sum_eps
    return _runner(backward_kernel, vectors, options, x, (grad, grad_sum, residual), wanted.v, numbers, constexprs)


def _runner(
    kernel: Any,
    vectors: Vectors,
    options: Options,
    x: Tensor,
    others: Sequence[Tensor | None],
    want_second: bool,
    numbers: tuple[float, ...],
    constexprs: dict[str, Any],
) -> Runner | None:
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take float32, float16 or bfloat16, not {x.dtype}")
    dense = torch.empty_like(x, device="meta")
    shape, size = tuple(x.shape), x.element_size()
    layout = layout_of(shape, x.stride(), dense.stride(), options.channel_dim, size)
    copies = layout is None
    if copies:
        layout = layout_of(shape, dense.stride(), dense.stride(), options.channel_dim, size)
    if not fits(layout):
        return None
    pointers = x, x, x if want_second else None, *others, *vectors
    given = [i for i, pointer in enumerate(pointers) if pointer is not None]
    launch = Launch(kernel, given, layout, numbers, constexprs, x.device)
    rearranges = any(t is not None and not is_laid_out_like(t, dense) for t in others)
    gathers = vectors.gapped

    def run(vectors: Vectors, x: Tensor, *others: Tensor | None) -> Results:
        first = torch.empty_like(x)
        second = torch.empty_like(x) if want_second else None
        if copies:
            x = torch.empty_like(first).copy_(x)
        if rearranges:
            others = tuple([t if t is None else laid_out_like(t, first) for t in others])
        if gathers:
            vectors = vectors.contiguous()
        launch(x, first, second, *others, *vectors)
        return first, second

    return run
