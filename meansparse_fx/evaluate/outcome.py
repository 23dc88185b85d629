"""Floor 5: what one model did, image by image, and how two compare on the same images.

Data and arithmetic; runs no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two accuracies on the same images, as fractions.

    Attributes:
        estimate: Second accuracy less the first.
        low, high: 95 % interval, by bootstrap over images.
        p_value: Exact two-sided test of "no difference", by flipping the signs of the images' changes (McNemar's
            test where the changes are of one image each).
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
    def of_changes(cls, changes: Tensor, resamples: int = 10_000, seed: int = 0) -> PairedDifference:
        """Return the mean of ``changes`` ``[N]``, small whole numbers, against 0."""
        n = len(changes)
        values, counts = (v.numpy() for v in changes.cpu().unique(return_counts=True))
        # Resampling images resamples how many have each value.
        draws = np.random.default_rng(seed).multinomial(n, counts / n, resamples) @ values / n
        low, high = np.quantile(draws, [0.025, 0.975])
        total = int(changes.sum())
        tail = sum(p for value, p in _sign_flips(changes.abs()).items() if value >= abs(total))
        return cls(total / n, float(low), float(high), min(1.0, 2 * tail) if total else 1.0)

    def points(self) -> str:
        """Return the difference in percentage points with its interval."""
        return f"{100 * self.estimate:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def to_dict(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "p_value": self.p_value}


def _sign_flips(sizes: Tensor) -> dict[int, float]:
    """Return the distribution of the sum of ``sizes`` with random signs."""
    found = {0: 1.0}
    for size in sizes.unique().tolist():
        if not size:
            continue
        n = int((sizes == size).sum())
        flips = {size * (2 * k - n): math.comb(n, k) / 2**n for k in range(n + 1)}
        sums: dict[int, float] = {}
        for a, p in found.items():
            for b, q in flips.items():
                sums[a + b] = sums.get(a + b, 0.0) + p * q
        found = sums
    return found


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
        """Return accuracies as fractions: clean, robust by attack, worst_case."""
        return {
            "clean": mean(self.clean),
            "robust": {name: mean(mask) for name, mask in self.robust.items()},
            "worst_case": mean(self.worst),
        }


def mean(mask: Tensor) -> float:
    """Return the share of a mask that is set."""
    return float(mask.double().mean())
