"""Floor 3: what a pass may take into the operator that stands before it: frozen batch norms.

Knows modules and tensors, nothing of graphs. Imports torch, the errors, and who follows a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateError
from .kernels.lowering import is_followed

_STATE = ("running_mean", "running_var", "weight", "bias")
WANT_GRADIENTS = 'want gradients now, and get none: requires_grad_(False), or transform with fuse="activation"'


class FrozenNorm:
    """A batch norm in eval mode as a scale and a shift per channel, always those of its present parameters.

    Args:
        module: Holds ``weight``, ``bias`` (both or neither may be None), ``running_mean`` and ``running_var``. It stays
            where it is in the model, so that nothing changes in its state_dict.
        eps: Added to the variance; None for the module's own, whatever that is by then.
    """

    def __init__(self, module: nn.Module, eps: float | None = None) -> None:
        self.module = module
        self.eps = eps
        self._state: list = []
        self._affine: tuple[Tensor, Tensor] | None = None

    def affine(self, site: str) -> tuple[Tensor, Tensor]:
        """Return scale and shift ``[C]``, float32 or wider: norm(x) = x * scale + shift.

        Raises:
            StateError: The norm would use the batch's statistics, or its parameters want gradients; names the site.
        """
        module = self.module
        parameters, buffers = module._parameters, module._buffers
        tensors = [
            parameters[n] if n in parameters else buffers[n] if n in buffers else getattr(module, n) for n in _STATE
        ]
        mean, variance, weight, bias = tensors
        if module.training or mean is None or variance is None:
            raise StateError(
                f"{site}: fused with a batch norm in eval mode, which is in train mode or lost its statistics: call "
                "eval(), or transform the model as it is now"
            )
        wanted = (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        if wanted and torch.is_grad_enabled():
            raise StateError(f"{site}: the parameters of the batch norm fused into it {WANT_GRADIENTS}")
        eps: Any = module.eps if self.eps is None else self.eps
        if torch.compiler.is_compiling() or is_followed():
            return _computed(eps, tensors)
        # Asking costs 4 us on a CPU, 1 elsewhere.
        state = [eps, *(None if t is None else _content(t) for t in tensors)]
        if self._affine is None or state != self._state:
            self._affine, self._state = _computed(eps, tensors), state
        return self._affine


def _computed(eps: float, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        mean, variance, weight, bias = (
            None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors
        )
        assert mean is not None  # as `affine` has seen
        assert variance is not None
        scale = torch.rsqrt(variance + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias


def _content(tensor: Tensor) -> object:
    """Return what is another where a tensor holds other values; on devices it overlooks ``tensor.data.mul_(2)``."""
    pointer = tensor.data_ptr()
    if pointer and tensor.is_cpu and tensor.is_contiguous():  # fake ones have no memory
        return ctypes.string_at(pointer, tensor.nbytes)
    return pointer, 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True, eq=False)
class Prologue:
    """What one call computes before the operator besides sums: u = sum_norm(input_norm(x) * layer_scale + residual).

    Attributes:
        input_norm: Of x.
        sum_norm: Of the sum.
        want_sum: Others read input_norm(x) * layer_scale + residual too: it is a second result.
    """

    input_norm: FrozenNorm | None = None
    sum_norm: FrozenNorm | None = None
    want_sum: bool = False

    def affines(self, site: str) -> tuple[Tensor | None, ...]:
        """Return scale and shift of x's norm, then of the sum's; None where there is none.

        Raises:
            StateError: As `FrozenNorm.affine` raises it.
        """
        found: list[Tensor | None] = []
        for norm in (self.input_norm, self.sum_norm):
            found += (None, None) if norm is None else norm.affine(site)
        return tuple(found)


def fused_parts(
    input_norm: object, layer_scale: object, residual: object, sum_norm: object, shortcut: object, want_sum: object
) -> str:
    """Return in words what a fused call takes in, of those that are there."""
    before = (input_norm, "norm"), (layer_scale, "LayerScale"), (residual, "sum"), (sum_norm, "norm")
    words = [" + ".join(word for there, word in before if there)]
    words += ["both results read"] * bool(want_sum) + ["sum after it"] * bool(shortcut)
    return ", ".join(filter(None, words))
