"""What runs calls of the operator on a GPU: layouts looked at once, results allocated, one kernel launched.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .composition import Wanted
from .device_activations import activation_constexprs
from .elementwise import backward_kernel, forward_kernel
from .layout import DTYPES, Layout, fits, is_laid_out_like, laid_out_like, layout_of
from .records import Options, Vectors
from .triton_launch import Launch


def forward_runner(
    vectors: Vectors, options: Options, x: Tensor, residual: Tensor | None, shortcut: Tensor | None
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Return ``(vectors, x, residual, shortcut) -> (y, v)`` for tensors like these; None beyond what a kernel counts.

    Args:
        options: Everything else. A v that is wanted is rounded to x's dtype first, and y is the function of that.
        x: float32, float16 or bfloat16, of any layout; copied at most once.
        residual, shortcut: Of x's shape, or broadcasting to it; copied if they lie otherwise.
    """
    layout, dense, copies = _walked(x, options.channel_dim)
    if not fits(layout):
        return None
    constexprs = {
        **activation_constexprs(options.activation, options.constants, vectors.weight), "VARIANT": options.variant,
    }  # fmt: skip
    given = _places(x, x, x if options.want_sum else None, residual, shortcut, *vectors)
    launch = Launch(forward_kernel, given, layout, (float(options.steepness),), constexprs, x.device)
    want_sum, gathers = options.want_sum, vectors.gapped
    rearranges = any(t is not None and not is_laid_out_like(t, dense) for t in (residual, shortcut))

    def run(
        vectors: Vectors, x: Tensor, residual: Tensor | None, shortcut: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        y = torch.empty_like(x)
        v = torch.empty_like(x) if want_sum else None
        if copies:
            x = torch.empty_like(y).copy_(x)
        if rearranges:
            residual, shortcut = (t if t is None else laid_out_like(t, y) for t in (residual, shortcut))
        if gathers:
            vectors = vectors.contiguous()
        launch(x, y, v, residual, shortcut, *vectors)
        return y, v

    return run


def backward_runner(
    vectors: Vectors,
    options: Options,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    from_sum: bool,
    wanted: Wanted,
) -> Callable[..., Sequence[Tensor | None]] | None:
    """Return ``(vectors, grad, grad_sum, x, residual) -> gradients`` for tensors like these; None as `forward_runner`.

    Arguments as in `composition.backward`, and gradients in its order; that of a learned slope is not among them.
    """
    layout, dense, copies = _walked(x, options.channel_dim)
    if not fits(layout):
        return None
    constexprs = {
        **activation_constexprs(options.activation, options.constants, vectors.weight),
        "VARIANT": options.variant, "BACKWARD": options.backward, "FROM_SUM": from_sum,
    }  # fmt: skip
    numbers = float(options.steepness), float(options.gate_steepness or 0.0)
    scaled, gathers = vectors.scaled, vectors.gapped
    given = _places(x, grad, grad_sum, residual, x, x if wanted.v and scaled else None, *vectors)
    launch = Launch(backward_kernel, given, layout, numbers, constexprs, x.device)
    rearranges = any(t is not None and not is_laid_out_like(t, dense) for t in (grad, grad_sum, residual))

    def run(
        vectors: Vectors, grad: Tensor, grad_sum: Tensor | None, x: Tensor, residual: Tensor | None
    ) -> Sequence[Tensor | None]:
        grad_x = torch.empty_like(x)
        grad_v = torch.empty_like(x) if wanted.v and scaled else None
        if copies:
            x = torch.empty_like(grad_x).copy_(x)
        if rearranges:
            grad, grad_sum, residual = (
                t if t is None else laid_out_like(t, grad_x) for t in (grad, grad_sum, residual)
            )
        if gathers:
            vectors = vectors.contiguous()
        launch(x, grad, grad_sum, residual, grad_x, grad_v, *vectors)
        return grad_x, grad_v if scaled else grad_x, None

    return run


def _walked(x: Tensor, channel_dim: int) -> tuple[Layout, Tensor, bool]:
    """Return how a kernel walks x, a tensor that lies as its results will, and whether x must be copied first.

    Raises:
        TypeError: If x is not float32, float16 or bfloat16; float64 is computed by torch operators.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take float32, float16 or bfloat16, not {x.dtype}")
    dense = torch.empty_like(x, device="meta")
    shape, size = tuple(x.shape), x.element_size()
    layout = layout_of(shape, x.stride(), dense.stride(), channel_dim, size)
    copies = layout is None
    if copies:
        layout = layout_of(shape, dense.stride(), dense.stride(), channel_dim, size)
    return layout, dense, copies


def _places(*pointers: Tensor | None) -> list[int]:
    return [i for i, pointer in enumerate(pointers) if pointer is not None]
