"""Floor 1: arrays that NumPy saved: an .npz file, or a directory of .npy files; never pickled ones."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from ..batches import IMAGE_KEYS, LABEL_KEYS
from ..errors import ArtifactError
from .image_set import LAYOUTS, Splits


def npz_splits(path: Path) -> Splits:
    """Return the splits in an .npz file, the names of its arrays as `_roles` reads them."""
    with _explained(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    if not (found := _splits(path, names, partial(_from_archive, path))):
        held = ", ".join(names) or "nothing"
        raise ArtifactError(f"{path}: no images and labels in it, but {held}; expected {LAYOUTS}")
    return found


def npy_splits(directory: Path) -> Splits:
    """Return the splits in a directory of .npy files, named as the arrays of an .npz file."""
    files = {file.stem: file for file in sorted(directory.glob("*.npy")) if not file.name.startswith(".")}
    return _splits(directory, files, lambda name: _from_file(files[name]))


def npy_split(file: Path) -> str:
    """Return the split of which an .npy file is the images or the labels."""
    return next(iter(_roles([file.stem])), file.stem)


def _from_archive(path: Path, name: str) -> np.ndarray:
    with _explained(path), zipfile.ZipFile(path) as archive:
        member = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}[name]
        with archive.open(member) as stream:
            return _array(stream, member.file_size)


def _from_file(file: Path) -> np.ndarray:
    with _explained(file), file.open("rb") as stream:
        return _array(stream, file.stat().st_size)


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


def _splits(path: Path, names: Iterable[str], read: Callable[[str], np.ndarray]) -> Splits:
    def pair(split: str, role: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        if "labels" not in role:
            lacking = f"{split}_labels" if split else "labels"
            raise ArtifactError(f"{path}: no images and labels in it: {role['images']}, but no {lacking}")
        return read(role["images"]), read(role["labels"])

    return {split: partial(pair, split, role) for split, role in _roles(names).items() if "images" in role}


def _roles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return by split which name is the ``images`` and which the ``labels``: ``x_train``, ``train_images``, ``Y``."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.split("_")
        known = {word.lower() for word in words} & {*IMAGE_KEYS, *LABEL_KEYS}
        if not known:
            continue
        own = found.setdefault("_".join(word for word in words if word.lower() not in known), {})
        role = "labels" if known & {*LABEL_KEYS} else "images"
        if role in own:
            raise ArtifactError(f"{own[role]} or {name}: which of them are the {role}? Name one otherwise")
        own[role] = name
    return found
