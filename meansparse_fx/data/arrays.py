"""Floor 1: arrays that NumPy saved: an .npz file, or a directory of .npy files; never pickled ones."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import ArtifactError
from .image_set import LAYOUTS, ImageSet, choose, describe, from_arrays

_IMAGES = {"images", "image", "imgs", "img", "x", "data"}
_LABELS = {"labels", "label", "y", "targets", "target"}


def open_npz(path: Path, split: str | None) -> ImageSet:
    """Return one split of an .npz file, the names of its arrays as `_roles` reads them."""
    with _explained(path), zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        name, *pair = _pair(path, split, members)
        arrays = []
        for member in (members[key] for key in pair):
            with archive.open(member) as stream:
                arrays.append(_array(stream, member.file_size))
        return from_arrays(arrays[0], arrays[1], describe(path, name))


def open_npy(directory: Path, split: str | None) -> ImageSet:
    """Return one split of a directory of .npy files, named as the arrays of an .npz file."""
    files = {file.stem: file for file in _npy_files(directory)}
    name, *pair = _pair(directory, split, files)
    arrays = []
    for file in (files[key] for key in pair):
        with _explained(file), file.open("rb") as stream:
            arrays.append(_array(stream, file.stat().st_size))
    return from_arrays(arrays[0], arrays[1], describe(directory, name))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    # A damaged header can be any Python, and a damaged directory names methods and members that are none.
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, TypeError, KeyError, RuntimeError),
        *(SyntaxError, tokenize.TokenError, MemoryError),
    ) as error:
        raise ArtifactError(f"{path}: truncated, or not plain arrays of NumPy ({error})") from error


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """Return the array of an .npy file of ``size`` bytes; NumPy alone takes memory for whatever its header says."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size - stream.tell():
        raise ValueError(f"its header asks for {dtype} {list(shape)}, more than it holds")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def npy_split(file: Path) -> str:
    """Return the split of which an .npy file is the images or the labels."""
    return next(iter(_roles([file.stem]).values()), {}).get("split", file.stem)


def has_npy(directory: Path) -> bool:
    """Return whether there are .npy files of images in a directory."""
    return any("images" in role for role in _roles(file.stem for file in _npy_files(directory)).values())


def _npy_files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.npy") if not file.name.startswith("."))


def _pair(path: Path, split: str | None, names: Iterable[str]) -> tuple[str, str, str]:
    """Return the split meant, and the names of its arrays of images and labels."""
    names = list(names)
    found = {name: role for name, role in _roles(names).items() if "images" in role}
    if not found:
        held = ", ".join(names) or "nothing"
        raise ArtifactError(f"{path}: no images and labels in it, but {held}; expected {LAYOUTS}")
    name = choose(path, split, found)
    images, labels = found[name]["images"], found[name].get("labels")
    if labels is None:
        raise ArtifactError(f"{path}: no images and labels in it: {images}, but no {name + '_' if name else ''}labels")
    return name, images, labels


def _roles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return by split which name is the ``images`` and which the ``labels``: ``x_train``, ``train_images``, ``Y``."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.split("_")
        known = {word.lower() for word in words} & (_IMAGES | _LABELS)
        if not known:
            continue
        split = "_".join(word for word in words if word.lower() not in known)
        role = "labels" if known & _LABELS else "images"
        if role in found.setdefault(split, {"split": split}):
            raise ArtifactError(f"{found[split][role]} or {name}: which of them are the {role}? Name one otherwise")
        found[split][role] = name
    return found
