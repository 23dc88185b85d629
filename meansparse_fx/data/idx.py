"""Floor 1: IDX files, the format of MNIST."""

from __future__ import annotations

import gzip
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import ArtifactError
from .image_set import Splits, as_float_images, from_arrays

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """Return the array of one IDX file, gzipped or not."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            raw = f.read()
    except (EOFError, zlib.error, OSError) as error:
        raise ArtifactError(f"{path}: truncated or unreadable ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _DTYPES or len(raw) < 4 + 4 * raw[3]:
        raise ArtifactError(f"{path}: not an IDX file")
    rank, dtype = raw[3], np.dtype(_DTYPES[raw[2]])
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
    found = from_arrays(*_pair(directory, split), str(directory))
    return as_float_images(found.images, directory), found.labels


def idx_splits(directory: Path) -> Splits:
    """Return the splits of which there are IDX images in a directory, by the files' prefixes."""
    names = sorted({f.name.split("-images")[0] for f in directory.glob("*-images[-.]idx3*")})
    return {name: partial(_pair, directory, name) for name in names}


def _pair(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for kind in ("images[-.]idx3", "labels[-.]idx1"):
        files = sorted(directory.glob(f"{split}-{kind}*"))
        if not files:
            raise ArtifactError(f"{directory}: no {split}-{kind.replace('[-.]', '-')}-ubyte file (or its .gz)")
        arrays.append(read_idx(files[0]))
    return arrays[0], arrays[1]
