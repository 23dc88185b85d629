"""Floor 5: the moments of all sites of a model, merged all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..observer import ChannelMoments
from ..shards import Ranks
from ..statistics import ChannelStatistics, merged


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """Count, mean and M2 of every channel of every site, the sites' channels one after the other.

    Attributes:
        counts: ``[S]``, values seen per channel of each site; Python's integers, so never rounded.
        mean, m2: ``[K]`` float64, K the channels of all sites.
        sizes: ``[S]`` int64, channels of each site, on the device of the others.
    """

    counts: tuple[int, ...]
    mean: Tensor
    m2: Tensor
    sizes: Tensor

    @classmethod
    def empty(cls, sizes: Sequence[int], device: torch.device) -> Totals:
        """Return the totals of no values."""
        zeros = torch.zeros(2, sum(sizes), dtype=torch.float64, device=device)
        return cls((0,) * len(sizes), zeros[0], zeros[1], torch.tensor(sizes, device=device))

    def of_batch(self, observers: Sequence[ChannelMoments]) -> Totals:
        """Return what the observers saw in their latest call, laid out like these totals."""
        latest = [observer.latest for observer in observers]
        seen = [moments for moments in latest if moments is not None]
        assert len(seen) == len(observers), "a site that its graph does not call"
        mean, m2 = torch.cat([s.mean for s in seen]), torch.cat([s.m2 for s in seen])
        return Totals(tuple(s.count for s in seen), mean, m2, self.sizes)

    def merge(self, other: Totals) -> Totals:
        """Return the totals of both samples together."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        shares = [b / max(n, 1) for b, n in zip(other.counts, counts, strict=True)]
        pairs = [shares, [a * s for a, s in zip(self.counts, shares, strict=True)]]
        factors = torch.tensor(pairs, dtype=torch.float64, device="cpu")
        share, between = self._per_channel(factors)
        return Totals(counts, *merged(self.mean, self.m2, other.mean, other.m2, share, between), self.sizes)

    def count_per_channel(self) -> Tensor:
        """Return ``[K]`` float64."""
        return self._per_channel(torch.tensor([self.counts], dtype=torch.float64, device="cpu"))[0]

    def by_site(self) -> list[ChannelStatistics]:
        """Return the moments of each site, copied: of ordinary tensors wherever these were made."""
        sizes = self.sizes.tolist()
        with torch.inference_mode(False):
            parts = zip(self.counts, self.mean.clone().split(sizes), self.m2.clone().split(sizes), strict=True)
            return [ChannelStatistics(count, mean.clone(), m2.clone()) for count, mean, m2 in parts]

    def _per_channel(self, per_site: Tensor) -> Tensor:
        moved = per_site.to(self.mean.device, non_blocking=True)
        return moved.repeat_interleave(self.sizes, dim=1, output_size=len(self.mean))


def merge_all(parts: Sequence[Totals]) -> Totals:
    """Return the totals of all samples together, merged in order."""
    return reduce(Totals.merge, parts)


def gather_totals(ranks: Ranks, own: Sequence[Totals], point: str) -> list[Totals]:
    """Return totals that every process has as many of: those of the first, then of the next."""
    found = ranks.gather([(t.counts, torch.stack([t.mean, t.m2]).cpu()) for t in own], point)
    pairs = [(counts, values.to(own[0].mean.device)) for rank in found for counts, values in rank]
    return [Totals(counts, values[0], values[1], own[0].sizes) for counts, values in pairs]
