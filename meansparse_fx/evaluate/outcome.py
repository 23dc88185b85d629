"""Floor 5: what one model did, image by image, and how two compare on the same images.

Data and arithmetic; runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

IN_WORDS = {"base": "base", "sparse": "with MeanSparse"}  # the two models
TRANSFER = "transfer"  # the row of the images that broke the other of two models
TAIL = 0.025  # on either side of a 95 % interval
SUBSETS = 2**13  # of images; the quantiles' own error is 0.2 %


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two accuracies on the same images, as fractions.

    Interval and test are one thing. Where images are right or wrong, a difference is in the interval unless, were it
    the true one, a net change as far off on its side would be found in less than 2.5 % of all samples. How often is
    computed, not approximated, for the shares of gained and lost images that are likeliest given that difference (Lloyd
    and Moldovan, 2007); where none changed, these are the bounds of Clopper and Pearson on changed images, about
    3.7 / N either way.

    Where each image has a share of right pixels, they are those of the sign-flip test, exact for any number of images
    whose differences are symmetric around the true one: a t interval wants them normal as well, a bootstrap many of
    them. A flip of some signs makes the mean no smaller if these differences sum to 0 or less, so the interval ends at
    quantiles of the means of all subsets (Hartigan, 1969), from 14 images on of random ones. Five images or fewer
    cannot be significant: theirs is [-1, 1].

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
        """Return the difference ``after - before`` of ``[N]`` masks of images classified correctly, or shares."""
        return cls.of_changes(change(before, after))

    @classmethod
    def of_changes(cls, changes: Tensor) -> PairedDifference:
        """Return the mean of ``changes`` ``[N]``, each -1, 0 or 1, or all of them between -1 and 1, against 0."""
        if changes.is_floating_point() and not bool((changes == changes.round()).all()):
            return cls(float(changes.mean()), *_by_subsets(changes))
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


def change(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after - before`` of masks or of shares ``[N]``, as numbers."""
    return after - before if after.is_floating_point() else after.int() - before.int()


def _by_subsets(changes: Tensor) -> tuple[float, float, float]:
    """Return interval and p-value of the sign-flip test for the mean of ``changes`` ``[N]``."""
    n = len(changes)
    if 2**n <= SUBSETS:
        chosen = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
    else:
        chosen = torch.randint(2, (SUBSETS, n), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        chosen[0] = 0  # no sign flipped: what was seen
    sizes = chosen.sum(1)
    sums = torch.cat([part.double() @ changes.double() for part in chosen.split(256)])
    means = (sums / sizes)[sizes > 0].sort().values.round(decimals=12)  # a sum of 0 is 0
    empty = len(sums) - len(means)
    rank = math.ceil(TAIL * len(sums)) - empty  # the first mean from either side that is not too far off
    low, high = (float(means[rank - 1]), float(means[-rank])) if rank > 0 else (-1.0, 1.0)
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum())) + empty
    return low, high, min(1.0, 2 * beyond / len(sums))


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
    """Which images one model classifies correctly, or which share of each one's pixels.

    Attributes:
        clean: ``[N]`` bool, on the images as they are; of label maps float64, the share of right pixels.
        robust: Attack (``name/backward``) to ``[n]``, correct before and after it; n < N if only the first
            n images were attacked.
        miou: Of label maps, for ``clean``, each attack and ``worst case``: mean over classes of intersection over
            union, counted over all images, each as it was where its accuracy was lowest.
    """

    clean: Tensor
    robust: dict[str, Tensor] = field(default_factory=dict)
    miou: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> ModelOutcome:
        """Return the outcome of masks by name: ``clean`` and the attacks."""
        return cls(rows["clean"], {name: mask for name, mask in rows.items() if name != "clean"})

    @property
    def worst(self) -> Tensor:
        """``[n]``: correct under everything that was run; of shares the least."""
        worst = self.clean[: min((len(m) for m in self.robust.values()), default=None)].clone()
        for survived in self.robust.values():
            worst = torch.minimum(worst, survived)
        return worst

    def worst_of(self, suffix: str) -> Tensor | None:
        """``[n]``: correct under the attacks whose names end with ``suffix``; None if none was run.

        Not under those from `TRANSFER` on, which begin at images that any attack may have found.
        """
        alone = takewhile(lambda row: row[0] != TRANSFER, self.robust.items())
        found = {name: mask for name, mask in alone if name.endswith(suffix)}
        return ModelOutcome(self.clean, found).worst if found else None

    def to_dict(self) -> dict:
        """Return accuracies as fractions: clean, robust by attack, worst_case; each image's 1, 0 or share (images)."""
        masks = {"clean": self.clean} | self.robust
        return {
            "clean": mean(self.clean),
            "robust": {name: mean(mask) for name, mask in self.robust.items()},
            "worst_case": mean(self.worst),
            "images": {
                name: mask.tolist() if mask.is_floating_point() else "".join(map(str, mask.int().tolist()))
                for name, mask in masks.items()
            },
            **({"miou": self.miou} if self.miou else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelOutcome:
        """Return what `to_dict` wrote."""
        masks = {
            name: torch.tensor([c == "1" for c in row])
            if isinstance(row, str)
            else torch.tensor(row, dtype=torch.float64)
            for name, row in values["images"].items()
        }
        return cls(masks.pop("clean"), masks, values.get("miou", {}))


def concatenated(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return by name the tensors of successive batches as one; some batches may not have them all."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def mean(mask: Tensor) -> float:
    """Return the share of a mask that is set."""
    return float(mask.double().mean())
