"""Floor 1: image data from the formats users have, as tensors in [0, 1].

Knows nothing of models or graphs. Imports errors and shards; torchvision when an image folder is opened. Nothing
is ever unpickled.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import ArtifactError
from .shards import ShardSampler

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_LAYOUTS = (
    "a directory of one directory of images per class, a directory of IDX files (NAME-images-idx3-ubyte[.gz] with its "
    "labels), or an .npz file of images and labels"
)


@dataclass(frozen=True, eq=False)
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
            shard: (rank, world) for one of several processes, which gets every world-th image.
            workers: Processes that read ahead; 0 reads in this one.
            pin_memory: Read into memory that a GPU can copy from while the host goes on.
        """
        sampler = ShardSampler(len(self), *shard)
        return DataLoader(self, batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory)

    def check_labels(self, classes: int) -> None:
        """Raise ArtifactError if a label has no logit in a model of that many classes."""
        if (highest := int(self.labels.max())) >= classes:
            raise ArtifactError(
                f"{self.description}: label {highest} is out of range for a model of {classes} classes; "
                "is it another data set's model?"
            )


def load_images(
    path: str | Path,
    split: str | None = None,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    skip: int = 0,
) -> ImageSet:
    """Return the labelled images at ``path``, in a fixed shuffled order.

    The order depends on the number of images alone, so that ``limit`` and ``skip`` cut the same disjoint
    parts every time.

    Args:
        path: A torchvision ImageFolder directory, a directory of IDX files, or an ``.npz`` file with ``images``
            and ``labels``, or ``NAME_images`` and ``NAME_labels`` for several splits.
        split: Subdirectory, prefix of the IDX files (``train``, ``t10k``), or NAME in the ``.npz``; needed where
            there are several.
        image_size: For image folders: side of the centred square (224 by default), cut from the image resized
            to 8/7 of it.
        limit: Number of images to keep at most.
        skip: Number of images to leave out before them.

    Raises:
        ArtifactError: Nothing there, a layout or a shape that is not understood, a truncated file, no images
            left, or labels that are not class numbers.

    Example:
        >>> import tempfile, numpy as np
        >>> file = tempfile.mkdtemp() + "/two.npz"
        >>> np.savez(file, images=np.zeros((2, 28, 28), np.uint8), labels=np.array([3, 7]))
        >>> images = load_images(file)
        >>> images[0][0].shape, sorted(images.labels.tolist())
        (torch.Size([1, 28, 28]), [3, 7])
    """
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or directory; expected {_LAYOUTS}")
    if path.is_file():
        if path.suffix != ".npz":
            raise ArtifactError(f"{path}: not a layout this package reads; expected {_LAYOUTS}")
        found = _open_npz(path, split)
    elif splits := idx_splits(path):
        found = _from_arrays(*_read_idx_split(path, _choose(path, split, splits)), _describe(path, split))
    else:
        found = _open_folder(path, split, image_size or 224)
    if image_size is not None and isinstance(found.images, np.ndarray):
        raise ArtifactError(f"{path}: holds arrays of a fixed size; an image size can be chosen for image folders only")
    kept = np.random.default_rng(0).permutation(len(found))[skip:][:limit]
    if len(kept) == 0:
        raise ArtifactError(f"{path}: no images left of {len(found)} (limit {limit}, skip {skip})")
    images = found.images[kept]
    if isinstance(images, np.ndarray):
        images = _as_float_images(images, path)
    description = found.description if len(kept) == len(found) else f"{found.description}, {len(kept)} of {len(found)}"
    return replace(found, images=images, labels=found.labels[torch.from_numpy(kept)], description=description)


def read_idx(path: Path) -> np.ndarray:
    """Return the array of one IDX file (the MNIST format), gzipped or not.

    Raises:
        ArtifactError: It is truncated or something else.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            raw = f.read()
    except (EOFError, zlib.error, OSError) as error:
        raise ArtifactError(f"{path}: truncated or unreadable ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES or len(raw) < 4 + 4 * raw[3]:
        raise ArtifactError(f"{path}: not an IDX file")
    rank, dtype = raw[3], np.dtype(_IDX_DTYPES[raw[2]])
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(raw) - 4 - 4 * rank != expected:
        raise ArtifactError(
            f"{path}: truncated or damaged, holds {len(raw) - 4 - 4 * rank} bytes of values where its header "
            f"{'x'.join(map(str, shape))} asks for {expected}"
        )
    return np.frombuffer(raw, dtype=dtype, offset=4 + 4 * rank).reshape(shape)


def load_idx(directory: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images ``[N, 1, H, W]`` in [0, 1] and labels ``[N]`` of ``split`` ("train" or "t10k"), in file order."""
    found = _from_arrays(*_read_idx_split(directory, split), _describe(directory, split))
    return _as_float_images(found.images, directory), found.labels


def idx_splits(directory: Path) -> list[str]:
    """Return the prefixes of the IDX image files in ``directory``."""
    return sorted({f.name.split("-images")[0] for f in directory.glob("*-images[-.]idx3*")})


def _read_idx_split(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for kind in ("images[-.]idx3", "labels[-.]idx1"):
        files = sorted(directory.glob(f"{split}-{kind}*"))
        if not files:
            raise ArtifactError(f"{directory}: no {split}-{kind.replace('[-.]', '-')}-ubyte file (or its .gz)")
        arrays.append(read_idx(files[0]))
    return arrays[0], arrays[1]


def _open_npz(path: Path, split: str | None) -> ImageSet:
    try:
        # Opened here: numpy leaves a file it cannot read open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if split is None and {"images", "labels"} <= set(file.files):
                return _from_arrays(file["images"], file["labels"], path.name)
            suffix = "_images"
            names = [n.removesuffix(suffix) for n in file.files if n.endswith(suffix)]
            name = _choose(path, split, names)
            if f"{name}_labels" not in file.files:
                raise ArtifactError(f"{path}: holds {name}_images but no {name}_labels")
            return _from_arrays(file[f"{name}_images"], file[f"{name}_labels"], _describe(path, name))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        raise ArtifactError(f"{path}: truncated, or not an .npz file of plain arrays ({error})") from error


def _choose(path: Path, split: str | None, names: Sequence[str]) -> str:
    """Return the one split meant, or raise with the names there are."""
    if split is None and len(names) == 1:
        return names[0]
    if split is not None and split in names:
        return split
    if not names:
        raise ArtifactError(f"{path}: no images and labels in it; expected {_LAYOUTS}")
    problem = "holds several splits" if split is None else f"has no split {split!r}"
    raise ArtifactError(f"{path}: {problem}; choose one of {', '.join(sorted(names))}")


def _describe(path: Path, split: str | None) -> str:
    return f"{path.name}, {split}" if split else path.name


def _from_arrays(images: np.ndarray, labels: np.ndarray, description: str) -> ImageSet:
    """Return arrays as a set, their labels checked; images stay as they are."""
    if images.ndim not in (3, 4) or len(images) != len(labels) or labels.ndim != 1:
        raise ArtifactError(
            f"{description}: images {list(images.shape)} and labels {list(labels.shape)}; expected [N, H, W], "
            "[N, 1, H, W], [N, 3, H, W] or [N, H, W, 3], and [N]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or (len(labels) and labels.min() < 0):
        raise ArtifactError(f"{description}: labels must be integers from 0, found {labels.dtype}")
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)), description)


def _as_float_images(images: np.ndarray, where: Path) -> Tensor:
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
            f"{where}: values from {images.min():g} to {images.max():g}; expected uint8, or floats in [0, 1]"
        )
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class _Files:
    """Image files, decoded when asked for; an array of indices selects files."""

    paths: list[str]
    decode: Callable[[str], Tensor]

    def __getitem__(self, index: int | np.ndarray) -> Any:
        if isinstance(index, np.ndarray):
            return _Files([self.paths[i] for i in index], self.decode)
        return self.decode(self.paths[index])


def _open_folder(path: Path, split: str | None, image_size: int) -> ImageSet:
    root = path / split if split else path
    if not root.is_dir():
        raise ArtifactError(f"{path}: has no subdirectory {split!r}")
    if not any(f.suffix.lower() in _IMAGE_SUFFIXES for d in root.iterdir() if d.is_dir() for f in d.iterdir()):
        subdirectories = ", ".join(sorted(d.name for d in root.iterdir() if d.is_dir())[:5])
        hint = f" (a split of it? it holds {subdirectories})" if subdirectories else ""
        raise ArtifactError(f"{root}: not a layout this package reads{hint}; expected {_LAYOUTS}")
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize, ToDtype
    except ImportError as error:
        raise ArtifactError(f"{root}: image folders need torchvision: pip install 'meansparse_fx[zoo]'") from error
    try:
        folder = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise ArtifactError(f"{root}: {error}") from error
    # 224 of 256 is the usual share of an image kept for evaluation.
    shape = Compose(
        [Resize(image_size * 8 // 7), CenterCrop(image_size), PILToTensor(), ToDtype(torch.float32, scale=True)]
    )

    def decode(file: str) -> Tensor:
        try:
            return shape(folder.loader(file))
        except OSError as error:
            raise ArtifactError(f"{file}: truncated or not an image ({error})") from error

    return ImageSet(
        _Files([p for p, _ in folder.samples], decode), torch.tensor(folder.targets), _describe(path, split)
    )
