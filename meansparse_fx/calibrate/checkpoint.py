"""Floor 5: what one process has measured so far, kept on disk: a killed pass goes on where it was, to the same bytes.

Everything is kept in float64 at a batch boundary, so the merges to come are those of an uninterrupted pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import artifacts
from ..errors import CalibrationError
from ..observer import ChannelMoments
from ..operators import OTHER_CHECKPOINT
from ..seen import image_marks, least_marks
from ..shards import file_of_rank
from ..statistics import Answers
from ..statistics.moments import BINS, ChannelHistogram
from .convergence import Groups
from .totals import Totals

FORMAT, VERSION = "meansparse_fx.checkpoint", "3"


class PassState:
    """Moments and position of a pass.

    Args:
        observers: Of the instrumented graph, in its order.

    Attributes:
        totals: Of all batches so far.
        batches, images: How many those were.
        input_range: ``[2]``, least and greatest value of all images.
        groups: Totals of groups of batches, if a tolerance was given.
        histograms: Of each site, if asked for and once the first batch was seen.
        marks: Those of the images, batch by batch: see `seen.image_marks`.
    """

    def __init__(self, observers: Sequence[ChannelMoments], device: torch.device, grouped: bool) -> None:
        self._observers = list(observers)
        self.totals = Totals.empty([o.channels for o in observers], device)
        self.batches = self.images = 0
        self.input_range = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64, device=device)
        self.groups = Groups(self.totals) if grouped else None
        self.histograms: list[ChannelHistogram] = []
        self.marks: list[Tensor] = []
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, images: Tensor) -> Totals:
        """Count the batch that the observers have just seen, and return its own totals; nothing waits for a GPU."""
        batch = self.totals.of_batch(self._observers)
        self.totals = self.totals.merge(batch)
        if images.numel():
            low, high = (value.double() for value in images.aminmax())
            least, greatest = torch.minimum(self.input_range[0], low), torch.maximum(self.input_range[1], high)
            self.input_range = torch.stack([least, greatest])
        bad = ~batch.m2.isfinite().all() & (self._first_bad < 0)  # nor is m2 where the mean is not
        self._first_bad = torch.where(bad, self.batches, self._first_bad)
        self.marks.append(image_marks(images))
        self.batches += 1
        self.images += len(images)
        return batch

    def count_into(self, histograms: Sequence[ChannelHistogram]) -> None:
        """Let the observers count into these from now on."""
        self.histograms = list(histograms)
        for observer, histogram in zip(self._observers, histograms, strict=True):
            observer.bins = histogram.count

    def refuse_non_finite(self) -> None:
        """Raise CalibrationError if any site has seen NaN or inf, with the first batch that brought it."""
        if (batch := int(self._first_bad)) < 0:
            return
        for observer, moments in zip(self._observers, self.totals.by_site(), strict=True):
            if not moments.m2.isfinite().all():
                raise CalibrationError(
                    f"{observer.name}: NaN or inf in the site's input, first in batch {batch}: check the data and "
                    "weights"
                )


class Checkpoint:
    """One process's checkpoint file.

    Args:
        path: Of one process; several have ``PATH.rank0-of-2`` and so on.
        every: Seconds between two writings.
        identity: What must be the same for a pass to go on, by what it is in words.
        function: What the model computes, where that is known.

    Raises:
        CalibrationError: From any method, if the file is of another calibration.
        ArtifactError: It is of another number of processes, or cannot be written (WriteError).
    """

    def __init__(
        self, path: str | Path, every: float, identity: dict[str, Any], function: Answers | None, rank: int, world: int
    ) -> None:
        self.path = file_of_rank(Path(path), rank, world)
        self._every, self._identity, self._function = every, identity, function
        self._last_write = time.monotonic()
        self._digests: dict[int, str] = {}
        self._first = ""
        artifacts.require_place(self.path)
        artifacts.remove_partial(self.path)

    def resume(self, state: PassState) -> None:
        """Take over what the file holds, if there is one."""
        if not self.path.exists():
            return
        header, tensors = artifacts.read(self.path, FORMAT, VERSION, "a checkpoint")
        with artifacts.parsing(self.path):
            for what, value in self._identity.items():
                if header["identity"].get(what) != value:
                    raise CalibrationError(
                        f"{self.path}: a checkpoint of another calibration, its {what} differs: remove it to start "
                        "from the beginning"
                    )
            if "function" in header and not Answers.same(header["function"], self._function):
                raise CalibrationError(f"{self.path}: {OTHER_CHECKPOINT}")
            device, sizes = state.totals.mean.device, state.totals.sizes
            tensors = {name: value.to(device) for name, value in tensors.items()}

            channels = len(state.totals.mean)
            moments = artifacts.typed_tensor(tensors, "moments", torch.float64, (None, 2, channels))
            counts = [tuple(map(artifacts.whole_number, of_sites)) for of_sites in header["counts"]]
            if any(len(of_sites) != len(sizes) for of_sites in counts):
                raise ValueError(f"other counts than of {len(sizes)} sites")
            totals = [Totals(count, mean, m2, sizes) for count, (mean, m2) in zip(counts, moments, strict=True)]
            state.totals, *of_groups = totals
            if state.groups is not None:
                state.groups.open, *state.groups.closed = of_groups
                state.groups.open_batches, state.groups.length = map(artifacts.whole_number, header["groups"])
            state.input_range = artifacts.typed_tensor(tensors, "input_range", torch.float64, (2,))
            state.marks = [artifacts.typed_tensor(tensors, "marks", torch.int64, (None,))]
            state.batches, state.images = (artifacts.whole_number(header[name]) for name in ("batches", "images"))
            if "histograms" in tensors:
                edges = artifacts.typed_tensor(tensors, "edges", torch.float64, (2, channels))
                counted = artifacts.typed_tensor(tensors, "histograms", torch.int64, (channels, BINS))
                parts = zip(*(part.split(sizes.tolist()) for part in (*edges, counted)), strict=True)
                with torch.inference_mode(False):
                    state.count_into([ChannelHistogram(*(part.clone() for part in site)) for site in parts])
            self._digests = {int(index): value for index, value in header["digests"].items()}

    def compare(self, index: int, images: Tensor) -> None:
        """Raise CalibrationError if a batch that an earlier process saw is not what it was; remember the first."""
        if index == 0:
            self._first = artifacts.digest(images)
        expected = self._digests.pop(index, None)
        if expected is not None and artifacts.digest(images) != expected:
            raise CalibrationError(
                f"{self.path}: a checkpoint of another data set or of another order of images: batch {index} differs. "
                "Use the same data, batch size and order, or remove it to start from the beginning"
            )

    def require_compared(self) -> None:
        """Raise CalibrationError if the loader ended before every batch was compared."""
        if self._digests:
            raise CalibrationError(
                f"{self.path}: a checkpoint after {max(self._digests) + 1} batches, more than the loader has now: "
                "remove it to start from the beginning"
            )

    def due(self) -> bool:
        """Return whether it is time to write."""
        return time.monotonic() - self._last_write >= self._every

    def write(self, state: PassState, images: Tensor) -> None:
        """Replace the file by what was measured so far, NaN and inf refused; ``images`` is the latest batch."""
        state.refuse_non_finite()
        groups, totals = state.groups, [state.totals]
        if groups is not None:
            totals += [groups.open, *groups.closed]
        tensors = {
            "moments": torch.stack([torch.stack([t.mean, t.m2]) for t in totals]),
            "input_range": state.input_range,
            "marks": least_marks(state.marks),
        }
        if found := state.histograms:
            tensors["edges"] = torch.stack([torch.cat([h.low for h in found]), torch.cat([h.width for h in found])])
            tensors["histograms"] = torch.cat([h.counts for h in found])
        header = {
            "identity": self._identity,
            "function": self._function and asdict(self._function),
            "batches": state.batches,
            "images": state.images,
            "counts": [t.counts for t in totals],
            "groups": None if groups is None else [groups.open_batches, groups.length],
            "digests": {"0": self._first, str(state.batches - 1): artifacts.digest(images)},
        }
        artifacts.write(self.path, FORMAT, VERSION, header, tensors)
        self._last_write = time.monotonic()
