"""The operators as torch sees them: schema, devices, fake tensors and autograd of ``torch.ops.meansparse``.

`mean_sparse` is the entry point: one node in eager execution, the composition of `traced` under torch.compile and
torch.export, where Inductor fuses it with what stands around it.

Floor 0: torch and, lazily through the CUDA lowering, triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled, compiled_moments, eager, layout, reference, traced
from .records import Vectors, options_of

_TAIL = "int channel_dim, str activation, float[] constants, str variant"

_library = torch.library.Library("meansparse", "DEF")
_library.define(
    f"mean_sparse(Tensor x, Tensor centre, Tensor threshold, Tensor? weight, {_TAIL}, str backward, float steepness)"
    " -> Tensor"
)
_library.define(
    "mean_sparse_backward(Tensor grad, Tensor x, Tensor centre, Tensor threshold, Tensor? weight, "
    f"{_TAIL}, str backward, float steepness) -> (Tensor, Tensor)"
)


def lowering() -> str:
    """Return the lowering asked for by MEANSPARSE_FX_LOWERING: ``auto`` (default), ``triton`` or ``eager``."""
    choice = os.environ.get("MEANSPARSE_FX_LOWERING", "auto")
    if choice not in ("auto", "triton", "eager"):
        raise ValueError(f"MEANSPARSE_FX_LOWERING={choice!r}: expected auto, triton or eager")
    return choice


def lowering_of(x: Tensor, channel_dim: int, weight: Tensor | None = None) -> str:
    """Return what computes the operator on x: ``triton``, ``compiled`` or ``eager``."""
    choice = lowering()
    if choice == "triton" or (choice == "auto" and x.is_cuda and x.dtype in layout.DTYPES):
        return "triton"
    if choice == "auto" and x.device.type == "cpu" and compiled.takes(x, channel_dim, weight):
        return "compiled"
    return "eager"


def _launch():
    from . import launch  # imports triton, which a CPU does without

    return launch


def nobody_looks_on(x: Tensor) -> bool:
    """Return whether the dispatcher would lead to an operator's implementation and nowhere else.

    Not so in a transform, a mode, a tracer or a profiler, and for subclasses. Its way there, with the arguments boxed
    and unboxed, takes a fifth of a millisecond between two convolutions, when no cache has the interpreter's code.
    """
    return (
        type(x) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def _forward(x, centre, threshold, weight, *options):
    vectors, options = Vectors(centre, threshold, weight), options_of(*options)
    where = lowering_of(x, options.channel_dim, weight)
    if where == "triton":
        return _launch().mean_sparse_forward(x, vectors, options)
    return (compiled if where == "compiled" else eager).forward(x, vectors, options)


def _backward(grad, x, centre, threshold, weight, *options):
    vectors, options = Vectors(centre, threshold, weight), options_of(*options)
    where = lowering_of(x, options.channel_dim, weight)
    if where == "triton":
        gradients = _launch().mean_sparse_backward(grad, x, vectors, options)
        return gradients.x, x.new_empty(0) if weight is None else gradients.weight
    return (compiled if where == "compiled" else eager).backward(grad, x, vectors, options)


_library.impl("mean_sparse", _forward, "CompositeExplicitAutograd")
_library.impl("mean_sparse_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("meansparse::mean_sparse", lib=_library)
def _(x, centre, threshold, weight, *_args):
    return torch.empty_like(x)


@torch.library.register_fake("meansparse::mean_sparse_backward", lib=_library)
def _(grad, x, centre, threshold, weight, *_args):
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


class _MeanSparse(torch.autograd.Function):
    """Keeps x, the per-channel vectors and the weight for backward, which computes everything else again.

    In the place of a ReLU it keeps the result, as that does: the next convolution keeps the same tensor.
    """

    @staticmethod
    def forward(ctx, x, centre, threshold, weight, *options):
        ctx.options = _, activation, _, variant, backward, _ = options
        if nobody_looks_on(x):
            y = _forward(x, centre, threshold, weight, *options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y = torch.ops.meansparse.mean_sparse.default(x, centre, threshold, weight, *options)
        result = reference.ACTIVATIONS[activation].keeps_result and traced.tells(activation, variant, backward)
        ctx.bare = result and backward == "identity"
        ctx.save_for_backward(y if result else x, centre, threshold, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.saved_tensors[3]
        if ctx.bare:  # the activation's own derivative, told from its result
            _, activation, constants, *_ = ctx.options
            grad_x = reference.ACTIVATIONS[activation].backward(grad, ctx.saved_tensors[0], None, *constants)
            return grad_x, *[None] * (3 + len(ctx.options))
        # Where a graph of the gradient is wanted, the dispatcher says that there is none.
        plain = nobody_looks_on(grad) and not torch.is_grad_enabled()
        run = _backward if plain else torch.ops.meansparse.mean_sparse_backward.default
        grad_x, grad_weight = run(grad, *ctx.saved_tensors, *ctx.options)
        return grad_x, None, None, None if weight is None else grad_weight, *[None] * len(ctx.options)


def _autograd(x, centre, threshold, weight, *options):
    # By hand instead of torch.library.register_autograd: 40 microseconds a call less, where no gradient is wanted.
    if wants_gradient(x, weight):
        return _MeanSparse.apply(x, centre, threshold, weight, *options)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.meansparse.mean_sparse.default(x, centre, threshold, weight, *options)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_library.impl("mean_sparse", _autograd, "Autograd")


def mean_sparse(
    x: Tensor,
    centre: Tensor,
    threshold: Tensor,
    channel_dim: int,
    activation: str = "identity",
    constants: Sequence[float] = (),
    weight: Tensor | None = None,
    variant: str = "mean",
    backward: str = "exact",
    steepness: float = 10.0,
) -> Tensor:
    """Return act(s(x)); arguments, shapes and semantics as in `reference.mean_sparse`.

    Only x, or the result of a ReLU, the per-channel vectors and the weight are kept for backward.
    """
    if torch.compiler.is_compiling():
        return traced.mean_sparse(
            x, centre, threshold, channel_dim, activation, constants, weight, variant, backward, steepness
        )
    options = channel_dim, activation, tuple(constants), variant, backward, steepness
    if nobody_looks_on(x):
        run = _MeanSparse.apply if wants_gradient(x, weight) else _forward
        return run(x, centre, threshold, weight, *options)
    return torch.ops.meansparse.mean_sparse.default(x, centre, threshold, weight, *options)


def channel_moments(x: Tensor, channel_dim: int) -> tuple[int, Tensor, Tensor]:
    """Return the count, the mean ``[C]`` and M2 ``[C]`` (float64) of each channel of x.

    The Triton kernel reads x once and is exact to float32 rounding relative to the deviation; on a CPU everything
    is float64.
    """
    choice = lowering()
    if choice == "auto" and x.device.type == "cpu" and compiled_moments.takes(x, channel_dim):
        return compiled_moments.channel_moments(x, channel_dim)
    if choice != "eager" and lowering_of(x, channel_dim) == "triton":
        return tuple(_triton_moments().channel_moments(x, channel_dim))
    count = x.numel() // x.shape[channel_dim]
    if count == 0:
        zeros = torch.zeros(2, x.shape[channel_dim], dtype=torch.float64, device=x.device)
        return 0, zeros[0], zeros[1]
    others = [d for d in range(x.dim()) if d != channel_dim]
    variance, mean = torch.var_mean(x.double(), dim=others, correction=0)
    return count, mean, variance * count


def activation_moments(
    x: Tensor, channel_dim: int, activation: str, constants: Sequence[float] = (), weight: Tensor | None = None
) -> tuple[Tensor, tuple[int, Tensor, Tensor]]:
    """Return act(x), and the moments of x as `channel_moments` does: on a GPU from one read of x."""
    if lowering_of(x, channel_dim, weight) == "triton":
        y, moments = _triton_moments().activation_moments(x, channel_dim, activation, constants, weight)
        return y, tuple(moments)
    wide = x if x.dtype == torch.float64 else x.float()
    slope = None if weight is None else reference.per_channel(weight.to(wide.dtype), x.dim(), channel_dim)
    y = reference.ACTIVATIONS[activation].forward(wide, slope, *constants).to(x.dtype)
    return y, channel_moments(x, channel_dim)


def _triton_moments():
    from . import moments  # imports triton, which a CPU does without

    return moments
