"""The Triton kernels called as a test wants them: directly, whatever the device, and without autograd."""

from __future__ import annotations

from torch import Tensor

from meansparse_fx.kernels import composition, launch
from meansparse_fx.kernels.composition import Gradients, Wanted
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors


def forward(
    x: Tensor, vectors: Vectors, options: Options, residual: Tensor | None = None, shortcut: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y, or y and v with ``options.want_sum``."""
    y, v = Operator(vectors, options, "triton").forward(x, residual, shortcut)
    return (y, v) if options.want_sum else y


def backward(
    grad: Tensor,
    x: Tensor,
    vectors: Vectors,
    options: Options,
    residual: Tensor | None = None,
    grad_sum: Tensor | None = None,
    want_grad_sum: bool = False,
) -> Gradients:
    """Return the gradients of x and, if wanted, of v; with ``options.want_sum`` x is v. That of a slope is torch's."""
    wanted, from_sum = Wanted(want_grad_sum and vectors.scaled), options.want_sum
    tensors = x, grad, grad_sum, None if from_sum else residual
    with_weight = wanted._replace(weight=vectors.weight is not None)
    found = composition.backward(*tensors, vectors, options, from_sum, with_weight)
    if x.numel():
        run = launch.backward_runner(vectors, options, *tensors, from_sum, wanted)
        found = Gradients(*run(vectors, *tensors), found.weight)
    return found._replace(v=found.x) if want_grad_sum and not vectors.scaled else found
