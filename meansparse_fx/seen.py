"""Floor 1: which images were seen, so that the same are noticed again. Imports nothing of this package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST_MARKS = 2**15  # that are kept, 256 KiB; of more images the least
MOST_VALUES = 1024
SHARED = 0.005  # of a set's images that may be in another: data sets have a few twice


def image_marks(images: Tensor) -> Tensor:
    """Return ``[N]`` int64: what stands for each of the images ``[N, ...]``, on every device alike.

    Of `MOST_VALUES` of an image at random places, to 16 bits each: 2 to 16 ms for 128 images on one CPU thread.
    Images that have all of these in common are equal for what it is for.
    """
    if not images.numel():
        return torch.zeros(len(images), dtype=torch.int64, device=images.device)
    shape, source = tuple(images.shape[1:]), np.random.PCG64(0)
    values = images.detach()
    if math.prod(shape) > MOST_VALUES:
        places = np.unravel_index(source.random_raw(MOST_VALUES) % math.prod(shape), shape)
        axes = [torch.arange(len(images))[:, None], *map(torch.from_numpy, places)]
        values = values[tuple(axis.to(images.device) for axis in axes)]
    values = (values.reshape(len(images), -1).float() * 65535).round().to(torch.int64)
    weights = torch.from_numpy(source.random_raw(values.shape[1]).view(np.int64)).to(images.device)
    return (values * weights).sum(1)  # modulo 2**64: the same in any order, however large the values are


def least_marks(parts: Sequence[Tensor]) -> Tensor:
    """Return the `MOST_MARKS` least of the marks of images, each once, sorted, on the CPU."""
    return torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *(part.cpu() for part in parts)]).unique()[
        :MOST_MARKS
    ]


def known_share(known: Tensor, marks: Tensor) -> float:
    """Return which share of N marks is among those that `least_marks` returned, estimated where it left some out."""
    comparable = marks if len(known) < MOST_MARKS else marks[marks <= known[-1]]
    return float(torch.isin(comparable, known).double().mean()) if len(comparable) else 0.0
