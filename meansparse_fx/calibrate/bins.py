"""Floor 5: per-channel histograms, counted in the same pass (the paper's Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..observer import ChannelMoments
from ..statistics import ChannelHistogram
from .totals import Totals

BINS = 256
REACH = 8  # deviations of the first batch on each side of its mean: a bin is a sixteenth of a deviation


class Bins:
    """The histograms of all channels of all sites, end to end.

    Args:
        low, width: ``[K]``, lower edge of the first bin and width of one.
        counts: ``[K, BINS]`` int64.
    """

    def __init__(self, low: Tensor, width: Tensor, counts: Tensor, sizes: Sequence[int]) -> None:
        self.low, self.width, self.counts = low, width, counts
        self._sizes = list(sizes)

    @classmethod
    def around(cls, first: Totals) -> Bins:
        """Return empty bins around what was seen first."""
        std = (first.m2 / first.count_per_channel().clamp_min(1)).sqrt()
        std = torch.where(std > 0, std, 1.0)
        counts = torch.zeros(len(std), BINS, dtype=torch.int64, device=std.device)
        return cls(first.mean - REACH * std, 2 * REACH / BINS * std, counts, first.sizes.tolist())

    def watch(self, observers: Sequence[ChannelMoments]) -> None:
        """Let the observers count into these bins."""
        parts = (v.split(self._sizes) for v in (self.low, self.width, self.counts))
        for observer, low, width, counts in zip(observers, *parts, strict=True):
            observer.bins = partial(_count, low[:, None], width[:, None], counts)

    def by_site(self) -> list[ChannelHistogram]:
        """Return the histogram of each site."""
        with torch.inference_mode(False):
            parts = (v.clone().split(self._sizes) for v in (self.low, self.width, self.counts))
            return [ChannelHistogram(*(p.clone() for p in site)) for site in zip(*parts, strict=True)]


def _count(low: Tensor, width: Tensor, counts: Tensor, values: Tensor) -> None:
    """Add ``values`` ``[C, n]`` to ``counts`` ``[C, BINS]``."""
    # NaN has no bin; the moments report it.
    place = ((values - low) / width).nan_to_num_(0).clamp_(0, BINS - 1).long()
    place += BINS * torch.arange(len(place), device=place.device)[:, None]
    # Not bincount: that waits for the GPU and is no faster on the CPU.
    one = torch.ones((), dtype=torch.int64, device=place.device)
    counts.view(-1).scatter_add_(0, place.flatten(), one.expand(place.numel()))
