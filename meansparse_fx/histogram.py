"""Floor 5: what the operator does to one channel's features (the paper's Figure 1), measured on images.

Runs a transformed model and looks on; draws nothing.
"""

from __future__ import annotations

import difflib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .errors import StatisticsError
from .kernels.reference import inside_band, per_channel, sparsify
from .nn import MeanSparse
from .operators import operators
from .statistics import Statistics


@dataclass(frozen=True, slots=True, eq=False)
class FeatureHistogram:
    """One channel's features before and after its operator (paper, Figure 1).

    Attributes:
        site, channel: Where.
        edges: ``[B + 1]``, of the bins, in the units of the features.
        before, after: ``[B]``, share of the values in each bin.
        mean, threshold: Centre and half width of the band; a negative threshold is an operator switched off.
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
    share: float
    images: int


@torch.no_grad()
def band_shares(sparse: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Return, by site, the share ``[C]`` of each channel's values that lie in the band at the model's alpha."""
    shares: dict[str, Tensor] = {}

    def look(operator: MeanSparse, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        centre, threshold = (
            per_channel(v, x.dim(), operator.channel_dim) for v in (operator.centre, operator.threshold)
        )
        inside = inside_band(x, centre, threshold).movedim(operator.channel_dim, 0).flatten(1)
        shares[operator.name] = inside.double().mean(1).cpu()

    _run_watched(sparse, images, look)
    return shares


@torch.no_grad()
def feature_histogram(
    sparse: fx.GraphModule, images: Tensor, site: str | None = None, channel: int | None = None, bins: int = 120
) -> FeatureHistogram:
    """Return the histogram of one channel's features on ``images``, before and after its operator.

    Args:
        sparse: A transformed model, at the alpha of interest.
        images: ``[N, C, H, W]``.
        site: By default the one with the channel that has the most values in its band; the first if none has any.
        channel: By default that channel of the site.
        bins: Number of bins, over the middle 99.8 % of the values and the whole band.
    """
    shares = band_shares(sparse, images)
    if site is None:
        site = max(shares, key=lambda name: shares[name].max())
    if channel is None:
        channel = int(shares[site].argmax())
    kept: list[Tensor] = []
    operator = operators(sparse)[site]

    def look(seen: MeanSparse, inputs: tuple[Tensor, ...]) -> None:
        if seen is operator:
            kept.append(inputs[0].detach().movedim(operator.channel_dim, 0)[channel].flatten())

    _run_watched(sparse, images, look)
    before = torch.cat(kept)
    centre, threshold = (operator.get_buffer(name)[channel] for name in ("centre", "threshold"))
    after = sparsify(before, centre, threshold, operator.variant, "exact", operator.steepness)
    mean, band = float(centre), float(threshold)
    values, sparse_values = (v.double().cpu().numpy() for v in (before, after))
    low, high = np.quantile(values, [0.001, 0.999])
    low, high = min(low, mean - 1.5 * max(band, 0.0)), max(high, mean + 1.5 * max(band, 0.0))
    width = (high - low) / bins or 1.0
    # The mean sits in the middle of a bin, so that the bar it becomes stands on it.
    first, last = np.floor((low - mean) / width), np.ceil((high - mean) / width)
    edges = mean + width * (np.arange(first, last + 2) - 0.5)
    counts = [np.histogram(v, edges)[0] / len(values) for v in (values, sparse_values)]
    return FeatureHistogram(
        site, channel, edges, counts[0], counts[1], mean, band, float(shares[site][channel]), len(images)
    )


def stored_histogram(statistics: Statistics, site: str, channel: int, alpha: float) -> FeatureHistogram:
    """Return the histogram that calibration counted of one channel, before and after an operator at ``alpha``.

    A bin that the band cuts gives up the share of its width that lies inside.

    Raises:
        StatisticsError: No such site or channel, or no histograms.
    """
    if site not in statistics:
        near = difflib.get_close_matches(site, statistics, 3) or list(statistics)[:3]
        raise StatisticsError(f"the statistics have no site {site!r}; there are {', '.join(near)}, ...")
    moments = statistics[site]
    if moments.histogram is None:
        raise StatisticsError(f"{site}: no histograms in the statistics: calibrate with histograms (--histograms)")
    if channel >= len(moments.mean):
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
        site, channel, edges[first : last + 1], before[first:last], after[first:last], mean, band,
        float((before * inside).sum()), statistics.images,
    )  # fmt: skip


def _run_watched(sparse: fx.GraphModule, images: Tensor, look: Any) -> None:
    """Run the model on ``images``, showing each operator's input to ``look``."""
    with ExitStack() as stack:
        for operator in operators(sparse).values():
            stack.callback(operator.register_forward_pre_hook(look).remove)
        sparse(images)
