"""Floor 3: what a pass may take into the operator that stands before it: frozen batch norms.

Knows modules and tensors, nothing of graphs. Imports torch and the errors only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import StateError

_STATE = ("running_mean", "running_var", "weight", "bias")


class FrozenNorm:
    """A batch norm in eval mode as a scale and a shift per channel, always those of its present parameters.

    Args:
        module: Holds ``weight``, ``bias`` (both or neither may be None), ``running_mean`` and ``running_var``. It stays
            where it is in the model, so that nothing changes in its state_dict.
        eps: Added to the variance.
    """

    def __init__(self, module: nn.Module, eps: float) -> None:
        self.module = module
        self.eps = eps
        self._state: list = []
        self._affine: tuple[Tensor, Tensor] | None = None

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift ``[C]``, float32 or wider: norm(x) = x * scale + shift."""
        module = self.module
        parameters, buffers = module._parameters, module._buffers
        tensors = [
            parameters[n] if n in parameters else buffers[n] if n in buffers else getattr(module, n) for n in _STATE
        ]
        if torch.compiler.is_compiling():
            return self._computed(tensors)
        state = [None if t is None else _content(t) for t in tensors]  # asking costs 4 us on a CPU, 1 elsewhere
        if self._affine is None or state != self._state:
            self._affine, self._state = self._computed(tensors), state
        return self._affine

    def _computed(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, variance, weight, bias = (
                None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors
            )
            assert mean is not None  # no norm without is taken in
            assert variance is not None
            scale = torch.rsqrt(variance + self.eps)
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
            StateError: A norm is in train mode; names the site.
        """
        found: list[Tensor | None] = []
        for norm in (self.input_norm, self.sum_norm):
            if norm is not None and norm.module.training:
                raise StateError(f"{site}: fused with a batch norm in eval mode, which is in train mode: call eval()")
            found += (None, None) if norm is None else norm.affine()
        return tuple(found)


def fused_parts(
    input_norm: object, layer_scale: object, residual: object, sum_norm: object, shortcut: object, want_sum: object
) -> str:
    """Return in words what a fused call takes in, of those that are there."""
    before = (input_norm, "norm"), (layer_scale, "LayerScale"), (residual, "sum"), (sum_norm, "norm")
    words = [" + ".join(word for there, word in before if there)]
    words += ["both results read"] * bool(want_sum) + ["sum after it"] * bool(shortcut)
    return ", ".join(filter(None, words))
