"""Floor 1: image files as tensors, read as torchvision reads it where that is right.

Pillow makes white of whatever is above 255 when it converts to RGB: 16-bit files become white nearly everywhere. Those
are scaled by the white of their type here; where a type has none, as 32-bit integers, the file is refused. An EXIF
orientation is left alone, as in torchvision, timm and RobustBench, so that accuracies are theirs.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize, to_dtype

from ..errors import ArtifactError

# What Pillow raises for files that are damaged, in one format or another.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
DEFAULT_SIZE = 224
_MOST_COLOUR = 4 / 255  # between channels of a gray image: JPEG rounds each
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


@dataclass(frozen=True, slots=True, eq=False)
class ImageFiles:
    """Image files; an index gives an image ``[3, size, size]`` float32 in [0, 1], an array of them selects files."""

    paths: list[str]
    size: int  # side of the centred square, cut from the image resized to 8/7 of it, as 224 of 256 is usual
    own: tuple[int, int] | None = None  # (width, height) of every image: they are left as they are
    gray: bool = False  # one channel, [1, size, size]

    @property
    def description(self) -> str:
        """What is done to the size of an image, in words."""
        if self.own is not None:
            return f"{self.own[1]}x{self.own[0]} as stored"
        return f"resized to {self.size * 8 // 7} and cut to {self.size}x{self.size}"

    def __getitem__(self, index: int | np.ndarray) -> Any:
        if isinstance(index, np.ndarray):
            return replace(self, paths=[self.paths[i] for i in index])
        file = self.paths[index]
        found = _opened(file)
        width, height = found.size if isinstance(found, Image.Image) else (found.shape[2], found.shape[1])
        if self.own not in (None, (width, height)):
            raise ArtifactError(
                f"{file}: {width}x{height}, where others are {self.own[0]}x{self.own[1]}: give an image size "
                "(--image-size), to which all are resized"
            )
        if self.own is None:
            found = center_crop(resize(found, [self.size * 8 // 7], antialias=True), [self.size, self.size])
        image = pil_to_tensor(found) if isinstance(found, Image.Image) else found.clamp(0, 1).expand(3, -1, -1)
        image = to_dtype(image, torch.float32, scale=True)
        if self.gray and float((image.amax(0) - image.amin(0)).max()) > _MOST_COLOUR:
            raise ArtifactError(f"{file}: in colour, where the model takes one channel: convert all images to gray")
        return image[:1] if self.gray else image


def _opened(file: str) -> Image.Image | Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, which say nothing of the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # From memory, where a damaged length can ask for no more than there is.
            with Image.open(io.BytesIO(Path(file).read_bytes())) as image:
                deep = image.mode in ("I", "F") or image.mode.startswith("I;")
                return _deep(image, file) if deep else image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ArtifactError(
            f"{file}: more than the {Image.MAX_IMAGE_PIXELS:,} pixels that Pillow opens, perhaps a decompression "
            "bomb: remove it, or make it smaller"
        ) from error
    except _DAMAGED as error:
        raise ArtifactError(f"{file}: truncated or not an image that Pillow reads ({error})") from error


def common_size(files: Iterable[str]) -> tuple[int, int] | None:
    """Return the ``(width, height)`` that all of these images have; None if they differ, or one cannot be read."""
    sizes = set()
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(file) as image:
                    sizes.add(image.size)
        except (Image.DecompressionBombError, *_DAMAGED):
            return None
        if len(sizes) > 1:
            return None
    return sizes.pop() if sizes else None


def _deep(image: Image.Image, file: str) -> Tensor:
    """Return an image of one channel and more than 8 bits as ``[1, H, W]`` in [0, 1]."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            found = f"floats from {values.min():g} to {values.max():g}"
            raise ArtifactError(f"{file}: {found}; expected [0, 1]: divide by their white")
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # those have 16 bits
        raise ArtifactError(f"{file}: signed or 32-bit integers, of which no value is white: save it with 8 or 16 bits")
    else:
        values /= 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 1 - values
    return torch.from_numpy(values)[None]
