"""Floor 5: everything one process has measured so far: what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..observer import ChannelMoments
from .bins import Bins
from .convergence import Groups
from .totals import Totals


class Tally:
    """Moments and position of a pass.

    Args:
        observers: Of the instrumented graph, in its order.

    Attributes:
        totals: Of all batches so far.
        batches, images: How many those were.
        input_range: ``[2]``, least and greatest value of all images.
        groups: Totals of groups of batches, if a tolerance was given.
        bins: Histograms, if asked for and once the first batch was seen.
    """

    def __init__(self, observers: Sequence[ChannelMoments], device: torch.device, grouped: bool) -> None:
        self._observers = list(observers)
        self.totals = Totals.empty([o.channels for o in observers], device)
        self.batches = self.images = 0
        self.input_range = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64, device=device)
        self.groups = Groups(self.totals) if grouped else None
        self.bins: Bins | None = None
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, images: Tensor) -> Totals:
        """Count the batch that the observers have just seen, and return its own totals; nothing waits for a GPU."""
        batch = self.totals.of_batch(self._observers)
        self.totals = self.totals.merge(batch)
        if images.numel():
            low, high = (value.double() for value in images.aminmax())
            least, greatest = torch.minimum(self.input_range[0], low), torch.maximum(self.input_range[1], high)
            self.input_range = torch.stack([least, greatest])
        bad = ~(batch.mean.isfinite() & batch.m2.isfinite()).all() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, self.batches, self._first_bad)
        self.batches += 1
        self.images += len(images)
        return batch

    def refuse_non_finite(self) -> None:
        """Raise CalibrationError if any site has seen NaN or inf, with the first batch that brought it."""
        if (batch := int(self._first_bad)) < 0:
            return
        for observer, moments in zip(self._observers, self.totals.by_site(), strict=True):
            if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
                raise CalibrationError(
                    f"{observer.name}: NaN or inf in the site's input, first in batch {batch}: check the data and "
                    "weights"
                )
