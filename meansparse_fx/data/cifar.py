"""Floor 1: the batches in which CIFAR-10 and CIFAR-100 are distributed, in their binary and in their Python version.

The Python version is pickled. It is read by an unpickler that calls nothing but the stand-ins below, which build
dictionaries, lists, numbers and arrays of whole numbers; anything else in the file is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .image_set import Splits

_PIXELS = 3 * 32 * 32


def cifar_splits(directory: Path) -> Splits:
    """Return ``train`` and ``test`` of CIFAR in a directory; of CIFAR-100 with their fine labels."""
    for suffix in (".bin", ""):
        hundred = suffix or (directory / "meta").is_file()  # a file "train" may be anything
        found: Splits = {}
        for name, pattern in (("train", "data_batch_*"), ("test", "test_batch")):
            files = [*sorted(directory.glob(pattern + suffix)), *([directory / (name + suffix)] if hundred else [])]
            if files := [f for f in files if f.suffix == suffix and f.is_file()]:
                found[name] = partial(_joined, files)
        if found:
            return found
    return {}


def _joined(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    parts = [(_binary if file.suffix else _python)(file) for file in files]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images.reshape(-1, 3, 32, 32), labels


def _binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(file, np.uint8)
    # CIFAR-100 has a coarse label before the fine one.
    labels = 2 if file.stem in ("train", "test") else 1
    if not len(raw) or len(raw) % (labels + _PIXELS):
        raise ArtifactError(f"{file}: truncated or not CIFAR's: {len(raw)} bytes, no multiple of {labels + _PIXELS}")
    rows = raw.reshape(-1, labels + _PIXELS)
    return rows[:, labels:], rows[:, labels - 1]


def _python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        held = _Unpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        named = {_text(key): value for key, value in held.items()}
        images = _plain(named["data"])
        labels = _plain(named["fine_labels"] if "fine_labels" in named else named["labels"])
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS:
            raise ArtifactError(f"{file}: data of {images.dtype} {list(images.shape)}; expected uint8 [N, {_PIXELS}]")
        if labels.shape != images.shape[:1]:
            raise ArtifactError(f"{file}: labels {list(labels.shape)} of {len(images)} images")
        return images, labels
    except ArtifactError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ArtifactError(f"{file}: truncated, or no batch of CIFAR ({error or type(error).__name__})") from error


class _Type:
    """Stands for numpy.dtype: whole numbers only."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not re.fullmatch("[iu][1248]", text := _text(name)):
            raise pickle.UnpicklingError(f"arrays of {text}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        if _text(state[1]) == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands for numpy.ndarray; takes its state as data."""

    values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, raw = state
        self.values = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _frombuffer(raw: Any, kind: _Type, shape: tuple, order: str) -> _Array:
    found = _Array()
    found.__setstate__((1, shape, kind, order == "F", raw))
    return found


def _encode(text: str, encoding: Any) -> bytes:
    if _text(encoding) != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


# What NumPy's arrays, and Python 3's bytes in protocol 2, are made of when they are unpickled.
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}
for _core in ("core", "_core"):
    _STAND_INS[f"numpy.{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _STAND_INS[f"numpy.{_core}.multiarray", "scalar"] = lambda kind, raw: int(np.frombuffer(raw, kind.dtype)[0])
    _STAND_INS[f"numpy.{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and files are not unpickled")
        return _STAND_INS[module, name]


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> np.ndarray:
    return value.values if isinstance(value, _Array) else np.asarray(value)
