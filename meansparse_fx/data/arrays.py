"""Floor 1: arrays that NumPy saved: an .npz file, or a directory of .npy files; never pickled ones."""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import ArtifactError
from .image_set import LAYOUTS, ImageSet, choose, describe, from_arrays

_IMAGES = {"images", "image", "imgs", "img", "x", "data"}
_HEADER = 2**16  # bytes that a header of plain arrays stays far below
_LABELS = {"labels", "label", "y", "targets", "target"}
# A damaged header can be any Python, and a damaged directory names methods and members that are none.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, TypeError, KeyError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, MemoryError),
)


def open_npz(path: Path, split: str | None) -> ImageSet:
    """Return one split of an .npz file, the names of its arrays as `_roles` reads them."""
    try:
        # Opened here: numpy leaves a file it cannot read open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            name, images, labels = _pair(path, split, file.files)
            for array in (images, labels):
                member = file.zip.getinfo(array if array in file.zip.namelist() else f"{array}.npy")
                with file.zip.open(member) as head:
                    _require_whole(head, member.file_size)
            return from_arrays(file[images], file[labels], describe(path, name))
    except _UNREADABLE as error:
        raise ArtifactError(f"{path}: truncated, or not an .npz file of plain arrays ({error})") from error


def open_npy(directory: Path, split: str | None) -> ImageSet:
    """Return one split of a directory of .npy files, named as the arrays of an .npz file."""
    name, *stems = _pair(directory, split, [file.stem for file in _npy_files(directory)])
    arrays = []
    for stem in stems:
        path = directory / f"{stem}.npy"
        try:
            with path.open("rb") as stream:
                _require_whole(stream, path.stat().st_size)
                stream.seek(0)
                arrays.append(np.load(stream, allow_pickle=False))
        except _UNREADABLE as error:
            raise ArtifactError(f"{path}: truncated, or not an .npy file of a plain array ({error})") from error
    return from_arrays(arrays[0], arrays[1], describe(directory, name))


def _require_whole(stream: IO[bytes], size: int) -> None:
    """Raise ValueError if an .npy file of ``size`` bytes has less than its header says: NumPy takes memory for it."""
    start = io.BytesIO(stream.read(_HEADER))
    version = np.lib.format.read_magic(start)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(start)
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size - start.tell():
        raise ValueError(f"its header asks for {dtype} {list(shape)}, more than it holds")


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
        raise ArtifactError(
            f"{path}: no images and labels in it, but {', '.join(names) or 'nothing'}; expected {LAYOUTS}"
        )
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
