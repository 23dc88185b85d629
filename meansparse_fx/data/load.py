"""Floor 1: which format lies at a path, and the part of it that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..arguments import whole
from ..errors import ArtifactError
from .arrays import npy_split, npy_splits, npz_splits
from .cifar import cifar_splits
from .idx import idx_splits
from .image_set import LAYOUTS, ImageSet, Splits, as_float_images, describe, from_arrays


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
        path: Of a format in docs/data.md: an image folder, Tiny-ImageNet, IDX files, CIFAR's batches, ``.npy`` files,
            or an ``.npz`` file.
        split: Subdirectory, prefix of the IDX files (``train``, ``t10k``), or NAME of the arrays ``NAME_images`` and
            ``NAME_labels``; needed where there are several.
        image_size: For image folders: side of the centred square, cut from the image resized to 8/7 of it. By default
            images stay as they are where all have one size; otherwise it is 224.
        limit: Number of images to keep at most.
        skip: Number of images to leave out before them.

    Raises:
        ArtifactError: Nothing there, a layout or a shape that is not understood, a truncated file, no images
            left, or labels that are not class numbers.
        ValueError: A number that is none, or negative.

    Example:
        >>> import tempfile, numpy as np
        >>> file = tempfile.mkdtemp() + "/two.npz"
        >>> np.savez(file, images=np.zeros((2, 28, 28), np.uint8), labels=np.array([3, 7]))
        >>> images = load_images(file)
        >>> images[0][0].shape, sorted(images.labels.tolist())
        (torch.Size([1, 28, 28]), [3, 7])
    """
    path, skip = Path(path), whole(skip, "skip", 0)
    limit = None if limit is None else whole(limit, "limit", 0)
    image_size = None if image_size is None else whole(image_size, "image_size", 1)
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or directory; expected {LAYOUTS}")
    try:
        found = _open(path, split, image_size)
    except ImportError as error:
        raise ArtifactError(f"{path}: to read it, torchvision is needed: pip install 'meansparse_fx[zoo]'") from error
    if image_size is not None and isinstance(found.images, np.ndarray):
        raise ArtifactError(f"{path}: holds arrays of a fixed size; an image size can be chosen for image folders only")
    kept = np.random.default_rng(0).permutation(len(found))[skip:][:limit]
    if len(kept) == 0:
        raise ArtifactError(f"{path}: no images left of {len(found)} (limit {limit}, skip {skip})")
    images = found.images[kept]
    if isinstance(images, np.ndarray):
        images = as_float_images(images, path)
    description = found.description
    if len(kept) < len(found):
        description += f", {len(kept)} of {len(found)}" + (f" after {skip}" if skip else "")
    return ImageSet(images, found.labels[torch.from_numpy(kept)], description)


# Of what lies in a directory each returns the splits that it can read; an image folder is what remains.
DIRECTORIES: tuple[Callable[[Path], Splits], ...] = (idx_splits, cifar_splits, npy_splits)


def _open(path: Path, split: str | None, image_size: int | None) -> ImageSet:
    """Return all images at ``path``, arrays as they are stored."""
    if path.is_file():
        if path.suffix == ".npz":
            return _choose(path, split, npz_splits(path))
        if path.suffix == ".npy":
            return _choose(path.parent, npy_split(path) if split is None else split, npy_splits(path.parent))
        raise ArtifactError(f"{path}: not a layout this package reads; expected {LAYOUTS}")
    places = [(path, split)]
    if split is not None and (path / split).is_dir():
        places.append((path / split, None))
    for directory, name in places:
        if found := next(filter(None, (splits(directory) for splits in DIRECTORIES)), None):
            return _choose(directory, name, found)
    from .folder import open_folder  # torchvision takes a second to import

    return open_folder(path, split, image_size)


def _choose(path: Path, split: str | None, splits: Splits) -> ImageSet:
    """Return the one split meant, or raise with the names there are; the name of the only unnamed one is empty."""
    if split is None and (len(splits) == 1 or "" in splits):
        split = "" if "" in splits else next(iter(splits))
    if split in splits:
        return from_arrays(*splits[split](), describe(path, split))
    if not splits:
        raise ArtifactError(f"{path}: no images and labels in it; expected {LAYOUTS}")
    problem = "holds several splits" if split is None else f"has no split {split!r}"
    names = ", ".join(sorted(filter(None, splits)))
    cure = f"choose one of {names}" if names else "its images are one split without a name: leave the name out"
    raise ArtifactError(f"{path}: {problem}; {cure}")
