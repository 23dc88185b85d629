"""Floor 1: which images were seen, so that the same are noticed again. Imports nothing of this package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

MOST_MARKS = 2**15  # that are kept, 256 KiB; of more images the least
SHARED = 0.005  # of a set's images that may be in another: data sets have a few twice

Part = tuple[str, int, int]  # of an image set: its identity, the first position, the one after the last


def image_marks(images: Tensor) -> Tensor:
    """Return ``[N]`` int64: what stands for each of the images ``[N, ...]``, to 16 bits a value, on every device alike.

    Cheap enough for every batch of a calibration: a sum of whole numbers with random weights, no copy to the CPU.

    Example:
        >>> a, b, again = image_marks(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0 - 1e-7]])).tolist()
        >>> a == again, a == b
        (True, False)
    """
    if not images.numel():
        return torch.zeros(len(images), dtype=torch.int64, device=images.device)
    flat = images.detach().reshape(len(images), -1)
    weights = torch.from_numpy(np.random.PCG64(0).random_raw(flat.shape[1]).view(np.int64)).to(images.device)
    parts = [(part.float() * 65535).round().to(torch.int64) * weights for part in flat.split(32)]
    return torch.cat([part.sum(1) for part in parts])


def least_marks(parts: Sequence[Tensor]) -> Tensor:
    """Return the `MOST_MARKS` least of the marks of images, each once, sorted, on the CPU."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(part.cpu() for part in parts)]).unique()[:MOST_MARKS]


def known_share(known: Tensor, marks: Tensor) -> float:
    """Return which share of images is among others, estimated where not all of those have kept their marks.

    Args:
        known: As `least_marks` returned them.
        marks: ``[N]``.
    """
    told = marks if len(known) < MOST_MARKS else marks[marks <= known[-1]]
    return float(torch.isin(told, known).double().mean()) if len(told) else 0.0


def overlap(own: Iterable[Part], others: Iterable[Part]) -> range | None:
    """Return the first positions that are in two collections of parts of image sets; None if there are none.

    Args:
        own, others: Each part the identity of an image set, its first position and the one after its last.

    Example:
        >>> overlap([("a", 0, 10), ("b", 0, 5)], [("b", 5, 9), ("a", 7, 20)])
        range(7, 10)
    """
    theirs = list(others)
    for name, first, end in own:
        for other, start, stop in theirs:
            if name == other and (shared := range(max(first, start), min(end, stop))):
                return shared
    return None
