"""Floor 1: labelled images, and what the readers of all formats share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batches import class_numbers, out_of_range
from ..errors import ArtifactError, DataError

LAYOUTS = (
    "a directory of one directory of images per class, Tiny-ImageNet, a directory of IDX files "
    "(NAME-images-idx3-ubyte[.gz] with its labels), of CIFAR's batches or of images.npy and labels.npy, or an .npz "
    "file of images and labels"
)


# What a reader finds at a path: by the name of the split, a function that returns its images and labels as stored.
Splits = dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset):
    """Labelled images: a sequence of pairs (image ``[C, H, W]`` float32 in [0, 1], label).

    Attributes:
        images: What an index turns into an image: a tensor ``[N, C, H, W]``, or files decoded when asked for.
        labels: ``[N]`` int64.
        description: Where they came from, for reports.
    """

    images: Any
    labels: Tensor
    description: str

    def __repr__(self) -> str:
        return f"{self.description}: {len(self)} images"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def loader(
        self, batch_size: int, shard: tuple[int, int] = (0, 1), workers: int = 0, pin_memory: bool = False
    ) -> DataLoader:
        """Return batches of (images, labels) in order.

        Args:
            batch_size: Images at a time; the last batch may be shorter.
            shard: (rank, world) for one of several processes, which gets every world-th image: of all, each once.
            workers: Processes that read ahead; 0 reads in this one.
            pin_memory: Read into memory that a GPU can copy from while the host goes on.
        """
        sampler = range(shard[0], len(self), shard[1])
        return DataLoader(self, batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory)

    def gray(self) -> ImageSet:
        """Return these images as one channel, ``[1, H, W]``: those of a folder are RGB otherwise, gray ones too.

        Raises:
            ArtifactError: They are arrays of three channels; or, from an image when it is read, it is in colour.
        """
        if hasattr(self.images, "gray"):
            images = replace(self.images, gray=True)
            return replace(self, images=images, description=f"{self.description}, gray")
        if self.images.shape[1] != 1:
            raise ArtifactError(f"{self.description}: arrays of {self.images.shape[1]} channels: save one of them")
        return self

    def check_labels(self, classes: int) -> None:
        """Raise ArtifactError if a label has no logit in a model of that many classes."""
        if problem := out_of_range(self.labels, classes):
            raise ArtifactError(f"{self.description}: {problem}")


def from_arrays(images: np.ndarray, labels: np.ndarray, description: str) -> ImageSet:
    """Return arrays as a set, their labels checked; images stay as they are."""
    if images.ndim not in (3, 4) or len(images) != len(labels):
        raise ArtifactError(
            f"{description}: images {list(images.shape)} and labels {list(labels.shape)}; expected [N, H, W], "
            "[N, 1, H, W], [N, 3, H, W] or [N, H, W, 3], and [N]"
        )
    try:
        numbers, _ = class_numbers(labels, len(images))
    except DataError as error:
        raise ArtifactError(f"{description}: {error}") from error
    if len(numbers) and int(numbers.min()) < 0:
        at = int((numbers < 0).nonzero()[0])
        raise ArtifactError(f"{description}: labels must be integers from 0, and image {at} has {int(numbers[at])}")
    return ImageSet(images, numbers, description)


def as_float_images(images: np.ndarray, where: Path) -> Tensor:
    """Return images ``[N, C, H, W]`` float32 in [0, 1] of any layout and value type understood."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] not in (1, 3):
        if images.shape[3] not in (1, 3):
            raise ArtifactError(f"{where}: images {list(images.shape)} have no axis of 1 or 3 channels, first or last")
        images = images.transpose(0, 3, 1, 2)
    if images.dtype == np.uint8:
        images = images / np.float32(255)
    elif not np.issubdtype(images.dtype, np.floating):
        raise ArtifactError(f"{where}: images of {images.dtype}; expected uint8, or floats in [0, 1]")
    elif not (images.min() >= 0 and images.max() <= 1):
        raise ArtifactError(
            f"{where}: values from {images.min():g} to {images.max():g}; expected uint8, or floats in [0, 1]: save "
            "values up to 255 as uint8, and images without their normalisation"
        )
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def describe(path: Path, split: str | None) -> str:
    """Return where images came from, for reports."""
    return f"{path.name}, {split}" if split else path.name
