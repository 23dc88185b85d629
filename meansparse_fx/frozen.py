"""Floor 3: what an operator takes in: frozen batch norms.

Knows modules and tensors, nothing of graphs. Imports torch, the errors and kernels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import StateError
from .kernels.lowering import is_followed
from .kernels.records import Norm
from .kernels.reference import folded_norm

_NONE: tuple[Norm, float] = (None, None, None, None), 1e-5
_STATE = ("running_mean", "running_var", "weight", "bias")
WANT_GRADIENTS = 'want gradients now, and get none: requires_grad_(False), or transform with fuse="activation"'


class FrozenNorm:
    """A batch norm in eval mode, always that of its present parameters.

    Args:
        module: Holds ``weight``, ``bias`` (both or neither may be None), ``running_mean`` and ``running_var``. It stays
            where it is in the model, so that nothing changes in its state_dict.
        eps: Added to the variance; None for the module's own, whatever that is by then.
    """

    def __init__(self, module: nn.Module, eps: float | None = None) -> None:
        self.module = module
        self._eps = eps
        self._state: list = []
        self._folded: Norm = ()

    def read(self, site: str) -> tuple[Norm, float]:
        """Return mean, variance, weight and bias ``[C]``, or on a CPU the norm folded, which is kept; and its eps.

        Raises:
            StateError: The norm would use the batch's statistics, or its parameters want gradients; names the site.
        """
        module = self.module
        parameters, buffers = module._parameters, module._buffers  # faster than attributes
        found = tuple(
            [parameters[n] if n in parameters else buffers[n] if n in buffers else getattr(module, n) for n in _STATE]
        )
        mean, variance, weight, bias = found
        if module.training or mean is None or variance is None:
            raise StateError(
                f"{site}: fused with a batch norm in eval mode, which is in train mode or lost its statistics: call "
                "eval(), or transform the model as it is now"
            )
        wanted = (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        if wanted and torch.is_grad_enabled():
            raise StateError(f"{site}: the parameters of the batch norm fused into it {WANT_GRADIENTS}")
        eps: Any = module.eps if self._eps is None else self._eps
        eps = float(eps)
        if not mean.is_cpu or torch.compiler.is_compiling() or is_followed():
            return found, eps
        # Folding costs 18 us on a CPU, comparing every byte 4: no way of writing to them is overlooked.
        state: list = [eps]
        for t in found:
            if t is None:
                state.append(None)
            elif t.is_contiguous() and (pointer := t.data_ptr()):  # fake ones have no memory
                state.append(ctypes.string_at(pointer, t.nbytes))
            else:
                return found, eps
        if state != self._state:
            with torch.inference_mode(False), torch.no_grad():  # later calls may want gradients
                self._folded, self._state = folded_norm(found, eps), state
        return self._folded, eps


class Norms(NamedTuple):
    """The vectors of an operator's two norms at this moment, all None where there is none; see `records.Vectors`."""

    input: Norm
    sum: Norm
    input_eps: float
    sum_eps: float


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

    @property
    def taken(self) -> list[FrozenNorm]:
        """The norms that there are."""
        return [norm for norm in (self.input_norm, self.sum_norm) if norm is not None]

    def norms(self, site: str) -> Norms:
        """Return what the norms are at this moment.

        Raises:
            StateError: As `FrozenNorm.read` raises it.
        """
        first, eps = _NONE if self.input_norm is None else self.input_norm.read(site)
        second, sum_eps = _NONE if self.sum_norm is None else self.sum_norm.read(site)
        return Norms(first, second, eps, sum_eps)


def fused_parts(
    input_norm: object, layer_scale: object, residual: object, sum_norm: object, shortcut: object, want_sum: object
) -> str:
    """Return in words what a fused call takes in, of those that are there."""
    before = (input_norm, "norm"), (layer_scale, "LayerScale"), (residual, "sum"), (sum_norm, "norm")
    words = [" + ".join(word for there, word in before if there)]
    words += ["both results read"] * bool(want_sum) + ["sum after it"] * bool(shortcut)
    return ", ".join(filter(None, words))
