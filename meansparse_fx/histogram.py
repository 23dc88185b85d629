"""Floor 5: what the operator does to one channel's features (the paper's Figure 1), measured on images.

Runs a transformed model under hooks; draws nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .kernels.reference import inside_band, per_channel, sparsify
from .nn import MeanSparse
from .operators import operators
from .statistics import FeatureHistogram, typical


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
        site, channel: By default those in the middle: see `typical`.
        bins: Number of bins, about, over the middle 99.8 % of the values and the whole band, whose edges are edges of
            bins.
    """
    shares = band_shares(sparse, images)
    if channel is None or site is None:
        site, found = typical(shares, site)
        channel = found if channel is None else channel
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
    # The mean sits in the middle of a bin, so that the bar it becomes stands on it; the band is an odd number of bins.
    if band > width / 6:
        width = 2 * band / (2 * round(band / width - 0.5) + 1)
    first, last = np.floor((low - mean) / width), np.ceil((high - mean) / width)
    edges = mean + width * (np.arange(first, last + 2) - 0.5)
    counts = [np.histogram(v, edges)[0] / len(values) for v in (values, sparse_values)]
    return FeatureHistogram(
        site, channel, edges, counts[0], counts[1], mean, band, float(operator.get_buffer("alpha")),
        float(shares[site][channel]), len(images),
    )  # fmt: skip


def _run_watched(sparse: fx.GraphModule, images: Tensor, look: Any) -> None:
    """Run the model on ``images``, showing each operator's input to ``look``."""
    with ExitStack() as stack:
        for operator in operators(sparse).values():
            stack.callback(operator.register_forward_pre_hook(look).remove)
        sparse(images)
