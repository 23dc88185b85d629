"""Floor 5: how well the statistics are known, judged by how they differ between groups of batches.

The values of one image are not independent, so their number says little. Groups of whole batches nearly are: the
standard error of a mean is the deviation of the groups' means over the square root of their number, and likewise for
the second moment. That needs batches in a shuffled order: on class-sorted data the first groups look alike and mislead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .totals import Totals, merge_all

MAX_GROUPS = 64  # at 64, neighbours are merged and groups become twice as long: memory stays bounded
MIN_GROUPS = 16  # with fewer, a standard error is itself uncertain by more than a fifth


@dataclass(frozen=True, slots=True)
class Precision:
    """What is known about the statistics' errors.

    Attributes:
        error: The largest over all channels of the standard errors of mean and std, in units of the channel's std.
        site, channel, quantity: Where it is, and whether of the ``mean`` or the ``std``.
        mean_error, std_error: Root mean square over all channels of the two standard errors, in the same units.
        groups: How many groups they were estimated from.
    """

    error: float
    site: str
    channel: int
    quantity: str
    mean_error: float
    std_error: float
    groups: int

    def moved(self, alpha: float) -> float:
        """Return the share of activations that would change side of the band's edges, were the statistics exact.

        For normal features: the density at an edge, times how far mean and threshold put it wrong, for two edges.
        """
        density = math.exp(-alpha * alpha / 2) / math.sqrt(2 * math.pi)
        return 2 * density * math.hypot(self.mean_error, alpha * self.std_error) * math.sqrt(2 / math.pi)

    def __str__(self) -> str:
        worst = f"{self.quantity} of {self.site} channel {self.channel}"
        return (
            f"standard errors at most {100 * self.error:.2g} % of a channel's deviation ({worst}), from {self.groups} "
            f"groups; about {100 * self.moved(0.3):.2g} % of activations on the wrong side of the band at alpha 0.3"
        )


class Groups:
    """The totals of consecutive groups of batches."""

    def __init__(self, empty: Totals) -> None:
        self._empty = empty
        self.closed: list[Totals] = []
        self.open = empty
        self.open_batches = 0
        self.length = 1  # batches a group

    def add(self, batch: Totals | None) -> bool:
        """Take the next batch, None where this process has none left; return whether a group was closed."""
        if batch is not None:
            self.open = self.open.merge(batch)
        self.open_batches += 1
        if self.open_batches < self.length:
            return False
        self.closed.append(self.open)
        self.open, self.open_batches = self._empty, 0
        if len(self.closed) == MAX_GROUPS:
            self.closed = [a.merge(b) for a, b in zip(self.closed[::2], self.closed[1::2], strict=True)]
            self.length *= 2
        return True


def precision(groups: list[Totals], names: list[str]) -> Precision | None:
    """Return how well the statistics of all groups together are known; None from too few groups.

    Channels that never change have no error, and are left out.
    """
    groups = [group for group in groups if all(group.counts)]
    if len(groups) < MIN_GROUPS:
        return None
    total = merge_all(groups)
    count = total.count_per_channel()
    variance = total.m2 / count
    alive = variance > 0
    between_means, between_squares = torch.zeros_like(variance), torch.zeros_like(variance)
    for group in groups:
        own_count = group.count_per_channel()
        shift = (group.mean - total.mean).square()
        between_means += own_count * shift
        between_squares += own_count * (group.m2 / own_count + shift - variance).square()
    freedom = (len(groups) - 1) * count
    safe = torch.where(alive, variance, 1.0)
    mean_error = torch.where(alive, (between_means / freedom / safe).sqrt(), 0.0)
    # d std = d variance / (2 std)
    std_error = torch.where(alive, (between_squares / freedom).sqrt() / (2 * safe), 0.0)
    worst, quantity = (mean_error, "mean") if mean_error.max() >= std_error.max() else (std_error, "std")
    sizes = dict(zip(names, total.sizes.tolist(), strict=True))
    places = [(name, channel) for name, size in sizes.items() for channel in range(size)]
    site, channel = places[int(worst.argmax())]
    mean_rms, std_rms = (float((e.square().sum() / alive.sum().clamp_min(1)).sqrt()) for e in (mean_error, std_error))
    return Precision(float(worst.max()), site, channel, quantity, mean_rms, std_rms, len(groups))
