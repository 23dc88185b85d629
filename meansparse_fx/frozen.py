"""Floor 3: what a pass may take into the operator: a frozen batch norm, and the sum before or behind it.

Knows modules and tensors, nothing of graphs. Imports torch only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self._state: tuple = ()
        self._affine: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x ``[N, C, ...]``, as torch computes it."""
        m = self.module
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, self.eps)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift ``[C]``, float32 or wider: norm(x) = x * scale + shift."""
        m = self.module
        tensors = (m.running_mean, m.running_var, m.weight, m.bias)
        # Loading weights or moving the model changes these; asking costs a microsecond, computing four launches.
        state = tuple(None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if self._affine is None or state != self._state:
            with torch.no_grad():
                mean, variance, weight, bias = (
                    None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors
                )
                scale = torch.rsqrt(variance + self.eps)
                scale = scale if weight is None else scale * weight
                shift = -mean * scale
                self._affine = scale, shift if bias is None else shift + bias
            self._state = state
        return self._affine


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """What stands before the operator in one call: u = outer(norm(x) * layer_scale + residual), where there is one.

    Attributes:
        norm: Of x.
        outer: Of the sum.
        want_sum: Others read norm(x) * layer_scale + residual too: it is a second result.
    """

    norm: FrozenNorm | None = None
    outer: FrozenNorm | None = None
    want_sum: bool = False
