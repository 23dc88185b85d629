"""Floor 1: activations as functions of a number, whatever they are written out of.

Mish is ``x * torch.tanh(F.softplus(x))``, ``x.mul((1 + x.exp()).log().tanh())`` and many more; the function is one. So
the table holds formulas and no spellings, and a piece of a model is what it computes at `POINTS`. Both dialects of
graphs read it (`sites.composites`). Another activation is one line. Imports torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = (0.07, 0.21, 0.5, 0.9, 1.3, 1.9, 2.4, 2.9, 3.4, 4.2, 5.3, 6.4, 9.1)
# Where functions are compared: on both sides of the kinks at 0, +-1, +-2, +-3 and 6. In float64.
POINTS = torch.tensor([-p for p in reversed(_SIDE)] + list(_SIDE), dtype=torch.float64)
_TOLERANCE = 1e-5  # authors write sqrt(2 / pi) as 0.79788; the two GELUs are 5e-4 apart


@dataclass(frozen=True, slots=True)
class Formula:
    """A row of the table.

    Attributes:
        name: What plans call it.
        function: ``(x) -> y``, or ``(x, constant) -> y``.
        constant: The constant that a function has if it is of this row, read off its values at `POINTS`; None for rows
            without one.
    """

    name: str
    function: Callable[..., Tensor]
    constant: Callable[[Tensor], Tensor] | None = None

    def is_of(self, values: Tensor) -> bool:
        """Return whether this is the function with ``values`` at `POINTS`."""
        expected = self.function(POINTS) if self.constant is None else self.function(POINTS, self.constant(values))
        # What is flat at zero is exactly so: a floor of 1e-6 under a denominator is no ReLU.
        error = torch.where(expected == 0, values.abs() * 1e7, (values - expected).abs())
        return bool((error <= _TOLERANCE).all())


def _at(values: Tensor, point: float) -> Tensor:
    return values[point == POINTS][0]


def _where(condition: Tensor, constant: Tensor) -> Tensor:
    return torch.where(condition, constant, torch.nan)  # NaN is equal to nothing


def _slope(values: Tensor) -> Tensor:
    """Return the slope of the negative side where it makes a leaky ReLU: less steep than the other."""
    slope = _at(values, -2.4) / -2.4
    return _where((slope > 1e-3) & (slope < 1), slope)


def _depth(values: Tensor) -> Tensor:
    """Return where an ELU ends on the negative side, from above zero."""
    depth = _at(values, -1.9) / math.expm1(-1.9)
    return _where(depth > 1e-2, depth)


def _shrinkage(values: Tensor) -> Tensor:
    lambd = 9.1 - _at(values, 9.1)
    return _where((lambd > 0) & (lambd < 5), lambd)


def _beta(values: Tensor) -> Tensor:
    """Return the factor inside of a sigmoid, of its values."""
    beta = torch.logit(_at(values, 0.5)) / 0.5
    return _where(beta > 0, beta)


# What makes a feature of its input, and has the operator before it. Rows without a constant come first.
FEATURES: tuple[Formula, ...] = (
    Formula("relu", F.relu),
    Formula("relu6", F.relu6),
    Formula("hardtanh", F.hardtanh),
    Formula("tanh", torch.tanh),
    Formula("softsign", F.softsign),
    Formula("tanhshrink", F.tanhshrink),
    Formula("softplus", F.softplus),
    Formula("gelu", F.gelu),
    Formula("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    Formula("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    Formula("mish", F.mish),
    Formula("hardswish", F.hardswish),
    Formula("hard_mish", lambda x: 0.5 * x * (x + 2).clamp(0, 2)),
    Formula("selu", F.selu),
    Formula("leaky_relu", lambda x, slope: torch.where(x > 0, x, slope * x), _slope),
    Formula("elu", lambda x, depth: torch.where(x > 0, x, depth * torch.expm1(x)), _depth),
    Formula("swish", lambda x, beta: x * torch.sigmoid(beta * x), lambda y: _beta(y / POINTS)),
    Formula("softshrink", lambda x, lambd: x.sign() * F.relu(x.abs() - lambd), _shrinkage),
)

# What makes a weight or a probability of it: a gate's, or a part of another function. No operator stands before these.
WEIGHTS: tuple[Formula, ...] = (
    Formula("hardsigmoid", F.hardsigmoid),
    Formula("hardsigmoid", lambda x: (0.2 * x + 0.5).clamp(0, 1)),  # Keras's
    Formula("logsigmoid", F.logsigmoid),
    Formula("sigmoid", lambda x, beta: torch.sigmoid(beta * x), _beta),
)


def formula_of(values: Tensor, table: tuple[Formula, ...]) -> str | None:
    """Return the name of the function with ``values`` at `POINTS`; None if the table has it not.

    Example:
        >>> x = POINTS
        >>> [formula_of(y, FEATURES) for y in (x * torch.log(1 + x.exp()).tanh(), (x + x.abs()) / 2, x.square())]
        ['mish', 'relu', None]
    """
    return next((formula.name for formula in table if formula.is_of(values)), None)


def is_affine(values: Tensor) -> bool:
    """Return whether ``a * x + b`` has these values at `POINTS`."""
    slope = (values[-1] - values[0]) / (POINTS[-1] - POINTS[0])
    expected = values[0] + slope * (POINTS - POINTS[0])
    return bool(((values - expected).abs() <= 1e-9 * values.abs().max()).all())


def is_even(values: Tensor) -> bool:
    """Return whether ``f(-x) = f(x)`` at `POINTS`, as of squares: energies and distances."""
    return torch.allclose(values, values.flip(0))
