"""Floor 5: a loader's batches from a given position on, and how to know them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from ..batches import Intake, as_batches, collect_samples, count, length, nothing_in
from ..errors import CalibrationError

# Of a DataLoader, of which some batches are read.
_KEPT = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor"
)  # fmt: skip


class Source:
    """Batches of images in a fixed order.

    Args:
        data: A loader, or anything else that `as_batches` takes.

    Attributes:
        batches: How many there are; None if the loader does not say.
        images: How many images there are; None if unknown.
        nothing: What to say if there turn out to be none.
    """

    def __init__(self, data: Any, model: nn.Module) -> None:
        self.nothing = nothing_in(data)
        self._loader = loader = as_batches(data)
        self._intake = Intake(model)
        self.batches = length(loader)
        self.images: int | None = None
        if self._by_index and self.batches is not None:
            sampler = loader.sampler  # type: ignore[attr-defined]
            self.images = len(sampler) if not loader.drop_last else self.batches * loader.batch_size  # type: ignore
        elif isinstance(loader, (list, tuple)):
            self.images = count(loader)

    @property
    def _by_index(self) -> bool:
        """Whether batches can be left out without reading them."""
        return (
            type(self._loader) is DataLoader
            and not isinstance(self._loader.dataset, IterableDataset)
            and type(self._loader.batch_sampler) is torch.utils.data.BatchSampler
        )

    def require_repeatable(self) -> None:
        """Raise CalibrationError if the loader is sure to give another order next time."""
        sampler = getattr(self._loader, "sampler", None)
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            raise CalibrationError(
                "a checkpoint needs the same order of images each time, and this loader shuffles: use shuffle=False, "
                "or give it a generator with a fixed seed"
            )

    def read(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (position, images) from batch ``start`` on, and before them what tells whether the order is the same.

        Those are the first batch and batch ``start - 1``. Others before ``start`` are not read where the loader
        works by index.
        """
        again = sorted({0, start - 1}) if start else []
        loader = self._loader
        batches: Iterable[tuple[int, Any]]
        if start and self._by_index:
            assert isinstance(loader, DataLoader)
            order = list(loader.batch_sampler)  # type: ignore[arg-type]
            chosen = [*again, *range(start, len(order))]
            same = {name: getattr(loader, name) for name in _KEPT}
            batches = zip(
                chosen, DataLoader(loader.dataset, batch_sampler=[order[i] for i in chosen], **same), strict=True
            )
        elif isinstance(loader, Sequence):
            batches = ((i, loader[i]) for i in [*again, *range(start, len(loader))])
        else:
            batches = ((i, batch) for i, batch in enumerate(collect_samples(loader)) if i >= start or i in again)
        for index, batch in batches:
            yield index, self._intake.images(batch)
