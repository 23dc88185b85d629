"""Floor 3: moments of one site's channels, exact under merging, and their histogram. Tensors and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StatisticsError

BINS = 256
REACH = 8  # deviations of what is seen first on each side of its mean: a bin is a sixteenth of a deviation


@dataclass(frozen=True, slots=True, eq=False)
class ChannelHistogram:
    """How often each channel's values fell into bins of equal width; the end bins also hold what lies beyond.

    Attributes:
        low: ``[C]`` float64, lower edge of the first bin.
        width: ``[C]`` float64, of one bin.
        counts: ``[C, B]`` int64.
    """

    low: Tensor
    width: Tensor
    counts: Tensor

    @classmethod
    def around(cls, first: ChannelStatistics) -> ChannelHistogram:
        """Return one of no values, with `BINS` bins around what was seen first."""
        std = torch.where(first.std > 0, first.std, 1.0)
        counts = torch.zeros(len(std), BINS, dtype=torch.int64, device=std.device)
        return cls(first.mean - REACH * std, 2 * REACH / BINS * std, counts)

    def count(self, values: Tensor) -> None:
        """Count ``values`` ``[C, n]`` as well. NaN has no bin; the moments report it."""
        channels, bins = self.counts.shape
        place = ((values - self.low[:, None]) / self.width[:, None]).nan_to_num_(0).clamp_(0, bins - 1).long()
        place += bins * torch.arange(channels, device=place.device)[:, None]
        # Not bincount: that waits for the GPU and is no faster on the CPU.
        one = torch.ones((), dtype=torch.int64, device=place.device)
        self.counts.view(-1).scatter_add_(0, place.flatten(), one.expand(place.numel()))

    def share_inside(self, centre: Tensor, half_width: Tensor) -> Tensor:
        """Return the share ``[C]`` of values within ``half_width`` of ``centre``; values lie evenly within a bin."""
        below = torch.nn.functional.pad(self.counts.cumsum(1), (1, 0)).double()  # [C, B + 1], below each edge

        def share_below(value: Tensor) -> Tensor:
            place = ((value - self.low) / self.width).clamp(0, self.counts.shape[1])
            edge = place.floor().long().clamp_max(self.counts.shape[1] - 1)
            start, end = (below.gather(1, (edge + step)[:, None])[:, 0] for step in (0, 1))
            return (start + (end - start) * (place - edge)) / below[:, -1].clamp_min(1)

        return share_below(centre + half_width) - share_below(centre - half_width)


@dataclass(frozen=True, slots=True, eq=False)
class ChannelStatistics:
    """Exact moments of one site's input.

    Attributes:
        count: Values seen per channel (images times positions); 0 if that is not known, and m2 is the variance then.
        mean: ``[C]`` float64, in the units of the input.
        m2: ``[C]`` float64, sum of squared deviations from the mean.
        histogram: Of the same values, if it was asked for.
    """

    count: int
    mean: Tensor
    m2: Tensor
    histogram: ChannelHistogram | None = None

    @property
    def std(self) -> Tensor:
        """Population standard deviation, ``[C]`` float64."""
        return (self.m2 / max(self.count, 1)).sqrt()

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return the moments of both samples together, without histograms: each calibration has bins of its own."""
        if self.mean.shape != other.mean.shape:
            raise StatisticsError(f"cannot merge {len(self.mean)} channels with {len(other.mean)}")
        count = self.count + other.count
        if count == 0:
            return self
        share = other.count / count
        mean, m2 = merged(self.mean, self.m2, other.mean, other.m2, share, self.count * share)
        return ChannelStatistics(count, mean, m2)


def merged(
    mean: Tensor, m2: Tensor, other_mean: Tensor, other_m2: Tensor, share: float | Tensor, between: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and M2 of two samples together (Chan, Golub and LeVeque, 1979).

    Args:
        share: The other sample's share of all values.
        between: That share times the first sample's count.
    """
    delta = other_mean - mean
    return mean + delta * share, m2 + other_m2 + delta.square() * between
