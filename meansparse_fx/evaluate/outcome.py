"""Floor 5: what one model did, image by image, and how two compare on the same images.

Data and arithmetic; runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

TAIL = 0.025  # on either side of a 95 % interval


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two accuracies on the same images, as fractions.

    Interval and test are one thing: a difference is in the interval unless, were it the true one, a net change as far
    off on its side would be found in less than 2.5 % of all samples. How often is computed, not approximated, for the
    shares of gained and lost images that are likeliest given that difference (Lloyd and Moldovan, 2007); where none
    changed, these are the bounds of Clopper and Pearson on changed images, about 3.7 / N either way.

    Attributes:
        estimate: Second accuracy less the first.
        low, high: 95 % interval.
        p_value: Two-sided, of "no difference"; under 0.05 where the interval leaves out 0.
    """

    estimate: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> PairedDifference:
        """Return the difference ``after - before`` of two ``[N]`` masks of images classified correctly."""
        return cls.of_changes(after.int() - before.int())

    @classmethod
    def of_changes(cls, changes: Tensor) -> PairedDifference:
        """Return the mean of ``changes`` ``[N]``, each -1, 0 or 1, against 0."""
        n, gained, lost = len(changes), int((changes == 1).sum()), int((changes == -1).sum())
        if gained + lost + int((changes == 0).sum()) != n:
            raise ValueError("an image is won, lost or neither: changes must be -1, 0 or 1")
        p_value = min(1.0, 2 * _at_most(min(gained, lost), max(gained, lost), n, 0.0)) if gained != lost else 1.0
        return cls((gained - lost) / n, -_highest(lost, gained, n), _highest(gained, lost, n), p_value)

    def points(self) -> str:
        """Return the difference in percentage points with its interval."""
        return f"{100 * self.estimate:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def to_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


def share_interval(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of Clopper and Pearson for a share of which ``right`` of ``n`` were seen."""
    return 1 - _highest(n - right, 0, n), _highest(right, 0, n)


@lru_cache(maxsize=4096)
def _highest(gained: int, lost: int, n: int) -> float:
    """Return the largest difference under which so small a net change is no rarer than 2.5 %."""
    low, high = (gained - lost) / n, 1.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(gained, lost, n, middle) >= TAIL else (low, middle)
    return high


def _at_most(gained: int, lost: int, n: int, difference: float) -> float:
    """Return how likely a net change of ``gained - lost`` or less is, were ``difference`` the true one.

    The shares of images gained and lost are the likeliest that differ by it (Tango, 1998).
    """
    b = difference * (2 * n - gained + lost) - gained - lost
    down = (math.sqrt(max(b * b + 8 * n * lost * difference * (1 - difference), 0.0)) - b) / (4 * n)
    down = max(down, 0.0, -difference)
    up = min(down + difference, 1 - down)
    # The net change is a sum of n equal draws: its distribution by Fourier transform, on all but impossible values.
    net = gained - lost
    half = min(n, math.ceil(abs(net) + n * abs(difference) + 10 * math.sqrt(n * (up + down)) + 40))
    turns = np.exp(-2j * np.pi * np.arange(2 * half + 1) / (2 * half + 1))
    likely = np.fft.ifft((1 - up - down + up * turns + down / turns) ** n).real
    return float(np.roll(likely, half)[: net + half + 1].sum())


@dataclass(frozen=True, slots=True, eq=False)
class ModelOutcome:
    """Which images one model classifies correctly.

    Attributes:
        clean: ``[N]`` bool, on the images as they are.
        robust: Attack (``name/backward``) to ``[n]`` bool, correct before and after it; n < N if only the first
            n images were attacked.
    """

    clean: Tensor
    robust: dict[str, Tensor] = field(default_factory=dict)

    @property
    def worst(self) -> Tensor:
        """``[n]`` bool: correct under everything that was run."""
        worst = self.clean[: min((len(m) for m in self.robust.values()), default=None)].clone()
        for survived in self.robust.values():
            worst &= survived
        return worst

    def worst_of(self, suffix: str) -> Tensor:
        """``[n]`` bool: correct under the attacks whose names end with ``suffix``."""
        return ModelOutcome(self.clean, {k: v for k, v in self.robust.items() if k.endswith(suffix)}).worst

    def to_dict(self) -> dict:
        """Return accuracies as fractions: clean, robust by attack, worst_case; and each image's 1 or 0 (images)."""
        masks = {"clean": self.clean} | self.robust
        return {
            "clean": mean(self.clean),
            "robust": {name: mean(mask) for name, mask in self.robust.items()},
            "worst_case": mean(self.worst),
            "images": {name: "".join(map(str, mask.int().tolist())) for name, mask in masks.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelOutcome:
        """Return what `to_dict` wrote."""
        masks = {name: torch.tensor([c == "1" for c in row]) for name, row in values["images"].items()}
        return cls(masks.pop("clean"), masks)


def mean(mask: Tensor) -> float:
    """Return the share of a mask that is set."""
    return float(mask.double().mean())
