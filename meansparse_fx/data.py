"""Floor 1: image data from the formats users have, as tensors in [0, 1].

Knows nothing of models or graphs.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_IDX_DTYPES = {0x08: np.uint8, 0x09: np.int8, 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """Return the array of one IDX file (the MNIST format), gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as f:
        raw = f.read()
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise ValueError(f"{path}: not an IDX file")
    rank = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    array = np.frombuffer(raw, dtype=_IDX_DTYPES[raw[2]], offset=4 + 4 * rank)
    if array.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: truncated, holds {array.size} values where its header says {shape}")
    return array.reshape(shape)


def load_idx(directory: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images ``[N, 1, H, W]`` in [0, 1] and labels ``[N]`` of ``split`` ("train" or "t10k")."""
    images, labels = (
        read_idx(next(iter(sorted(directory.glob(f"{split}-{kind}*"))))) for kind in ("images-idx3", "labels-idx1")
    )
    return torch.from_numpy(images / np.float32(255)).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
