"""Floor 3: one channel's values before and after an operator (the paper's Figure 1). Arithmetic; runs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import StatisticsError
from .moments import ChannelStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FeatureHistogram:
    """One channel's features before and after its operator (paper, Figure 1).

    Attributes:
        site, channel: Where.
        edges: ``[B + 1]``, of the bins, in the units of the features.
        before, after: ``[B]``, share of the values in each bin.
        mean, threshold: Centre and half width of the band; a negative threshold is an operator switched off.
        alpha: The threshold in standard deviations.
        share: Of the values that lie in the band, which the operator makes one value.
        images: Number of images the features come from.
    """

    site: str
    channel: int
    edges: np.ndarray
    before: np.ndarray
    after: np.ndarray
    mean: float
    threshold: float
    alpha: float
    share: float
    images: int

    def __repr__(self) -> str:
        return f"{self.site}, channel {self.channel}, alpha {self.alpha:g}: {100 * self.share:.1f} % in the band"

    def figure(self) -> Figure:
        """Return the two histograms, band and mean marked."""
        from ..plots import histogram_figure  # matplotlib takes a second to import

        return histogram_figure(self)


def typical(shares: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the (site, channel) whose share of values in the band is the median of all channels.

    Neither picked for its looks nor dead, as the channel with the largest share often is.

    Args:
        shares: Site to ``[C]``.
    """
    middle = torch.cat(list(shares.values())).median()
    return next((name, int((own == middle).nonzero()[0])) for name, own in shares.items() if (own == middle).any())


def stored_histogram(
    site: str, moments: ChannelStatistics, channel: int, alpha: float, images: int
) -> FeatureHistogram:
    """Return the histogram that calibration counted of one channel, before and after an operator at ``alpha``.

    A bin that the band cuts gives up the share of its width that lies inside.

    Raises:
        StatisticsError: No such channel.
    """
    assert moments.histogram is not None
    if not 0 <= channel < len(moments.mean):
        raise StatisticsError(f"{site}: no channel {channel}, it has {len(moments.mean)}, counted from 0")
    mean, std = float(moments.mean[channel]), float(moments.std[channel])
    low, width = float(moments.histogram.low[channel]), float(moments.histogram.width[channel])
    counts = moments.histogram.counts[channel].double().numpy()
    band = alpha * std if alpha * std > 0 else -1.0
    edges = low + width * np.arange(len(counts) + 1)
    before = counts / max(counts.sum(), 1)
    inside = np.clip(np.minimum(edges[1:], mean + band) - np.maximum(edges[:-1], mean - band), 0, None) / width
    after = before * (1 - inside)
    after[min(max(int((mean - low) / width), 0), len(counts) - 1)] += (before * inside).sum()
    seen = np.flatnonzero(counts)
    first, last = (seen[0], seen[-1] + 1) if len(seen) else (0, len(counts))
    return FeatureHistogram(
        site, channel, edges[first : last + 1], before[first:last], after[first:last], mean, band, alpha,
        float((before * inside).sum()), images,
    )  # fmt: skip
