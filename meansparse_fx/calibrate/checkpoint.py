"""Floor 5: what one process has measured so far, kept on disk: a killed pass goes on where it was, to the same bytes.

Everything is kept in float64 at a batch boundary, so the merges to come are those of an uninterrupted pass.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import artifacts
from ..errors import CalibrationError
from ..observer import ChannelMoments
from ..seen import image_marks, least_marks
from ..shards import own_file
from .bins import BINS, Bins
from .convergence import Groups
from .totals import Totals

FORMAT, VERSION = "meansparse_fx.checkpoint", "2"


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
        self._marks: list[Tensor] = []
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
        self._marks.append(image_marks(images))
        self.batches += 1
        self.images += len(images)
        return batch

    @property
    def marks(self) -> Tensor:
        """Those of the images so far: see `Statistics.marks`."""
        self._marks = [least_marks(self._marks)]
        return self._marks[0]

    @marks.setter
    def marks(self, known: Tensor) -> None:
        self._marks = [known]

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

    Raises:
        CalibrationError: From any method, if the file is of another calibration.
        ArtifactError: It is of another number of processes, or cannot be written (WriteError).
    """

    def __init__(self, path: str | Path, every: float, identity: dict[str, Any], rank: int, world: int) -> None:
        self.path = own_file(Path(path), rank, world)
        self._every, self._identity = every, identity
        self._last_write = time.monotonic()
        self._digests: dict[int, str] = {}
        self._first = ""
        artifacts.require_place(self.path)
        artifacts.remove_partial(self.path)

    def resume(self, tally: Tally) -> None:
        """Take over what the file holds, if there is one."""
        if not self.path.exists():
            return
        header, tensors = artifacts.read(self.path, FORMAT, VERSION, "a checkpoint")
        with artifacts.understanding(self.path):
            for what, value in self._identity.items():
                if header["identity"].get(what) != value:
                    raise CalibrationError(
                        f"{self.path}: a checkpoint of another calibration, its {what} differs: remove it to start "
                        "from the beginning"
                    )
            device, sizes = tally.totals.mean.device, tally.totals.sizes
            tensors = {name: value.to(device) for name, value in tensors.items()}

            def pair(name: str) -> Tensor:  # [2, K]
                return artifacts.in_form(tensors, name, torch.float64, (2, len(tally.totals.mean)))

            def totals(name: str) -> Totals:
                counts = tuple(map(artifacts.whole_number, header["counts"][name]))
                if len(counts) != len(sizes):
                    raise ValueError(f"{len(counts)} counts for {len(sizes)} sites")
                mean, m2 = pair(name)
                return Totals(counts, mean, m2, sizes)

            tally.totals = totals("totals")
            tally.input_range = artifacts.in_form(tensors, "input_range", torch.float64, (2,))
            tally.marks = artifacts.in_form(tensors, "marks", torch.int64, (None,))
            tally.batches, tally.images = (artifacts.whole_number(header[name]) for name in ("batches", "images"))
            if tally.groups is not None:
                kept = {name: artifacts.whole_number(value) for name, value in header["groups"].items()}
                tally.groups.closed = [totals(f"group{i}") for i in range(kept["closed"])]
                tally.groups.open, tally.groups.open_batches = totals("open"), kept["open_batches"]
                tally.groups.length = kept["length"]
            if "histograms" in tensors:
                low, width = pair("edges")
                counts = artifacts.in_form(tensors, "histograms", torch.int64, (len(low), BINS))
                tally.bins = Bins(low, width, counts, sizes.tolist())
            self._digests = {int(index): value for index, value in header["digests"].items()}

    def compare(self, index: int, images: Tensor) -> None:
        """Raise CalibrationError if a batch that an earlier process saw is not what it was; remember the first."""
        if index == 0:
            self._first = artifacts.digest(images)
        if (expected := self._digests.pop(index, None)) is not None and artifacts.digest(images) != expected:
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

    def write(self, tally: Tally, images: Tensor) -> None:
        """Replace the file by what was measured so far; ``images`` is the latest batch."""
        totals = {"totals": tally.totals}
        groups: dict[str, int] = {}
        if tally.groups is not None:
            totals |= {f"group{i}": group for i, group in enumerate(tally.groups.closed)} | {"open": tally.groups.open}
            groups = {
                "closed": len(tally.groups.closed),
                "open_batches": tally.groups.open_batches,
                "length": tally.groups.length,
            }
        tensors = {name: torch.stack([t.mean, t.m2]) for name, t in totals.items()}
        tensors |= {"input_range": tally.input_range, "marks": tally.marks}
        if tally.bins is not None:
            tensors["edges"] = torch.stack([tally.bins.low, tally.bins.width])
            tensors["histograms"] = tally.bins.counts
        header = {
            "identity": self._identity,
            "batches": tally.batches,
            "images": tally.images,
            "counts": {name: list(t.counts) for name, t in totals.items()},
            "groups": groups,
            "digests": {"0": self._first, str(tally.batches - 1): artifacts.digest(images)},
        }
        artifacts.write(self.path, FORMAT, VERSION, header, tensors)
        self._last_write = time.monotonic()
