"""Floor 1: the batches in which CIFAR-10 and CIFAR-100 are distributed, in their binary and in their Python version.

The Python version is pickled: torchvision reads it, and only where its checksums say that it is CIFAR's own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ArtifactError
from .image_set import Splits

_PIXELS = 3 * 32 * 32


def cifar_splits(directory: Path) -> Splits:
    """Return ``train`` and ``test`` of CIFAR in a directory; of CIFAR-100 with their fine labels."""
    binary = {"train": ("data_batch_*.bin", "train.bin"), "test": ("test_batch.bin", "test.bin")}
    files = {split: [f for name in names for f in sorted(directory.glob(name))] for split, names in binary.items()}
    if any(files.values()):
        return {split: partial(_binary, own) for split, own in files.items() if own}
    if any((directory / name).is_file() for name in ("data_batch_1", "test_batch")):
        return {split: partial(_python, directory, "CIFAR10", split) for split in binary}
    if all((directory / name).is_file() for name in ("train", "meta")):  # a file "train" alone may be anything
        return {split: partial(_python, directory, "CIFAR100", split) for split in binary}
    return {}


def _binary(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for file in files:
        raw = np.fromfile(file, np.uint8)
        width = _PIXELS + (2 if file.stem in ("train", "test") else 1)  # CIFAR-100: a coarse label, then the fine one
        if not len(raw) or len(raw) % width:
            raise ArtifactError(f"{file}: truncated or not CIFAR's: {len(raw)} bytes, no multiple of {width}")
        parts.append(raw.reshape(-1, width)[:, -_PIXELS - 1 :])
    rows = np.concatenate(parts)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _python(directory: Path, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision import datasets  # takes a second to import

    here = type(name, (getattr(datasets, name),), {"base_folder": ""})
    try:
        found = here(directory, train=split == "train")
    except RuntimeError as error:
        raise ArtifactError(
            f"{directory}: truncated, or not {name}'s own batches, all of them, by their checksums; others would have "
            "to be unpickled, and are not read: save them as .npz"
        ) from error
    return found.data, np.asarray(found.targets)
