"""Floor 1: loaders of every kind as iterables of batches, what in a batch are the images and the labels, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..errors import DataError, first_line

BATCH_SIZE = 128  # of what does not come in batches: a tensor, a Dataset, single images
IMAGE_KEYS = ("pixel_values", "image", "images", "img", "imgs", "x", "input", "inputs", "data", "jpg", "jpeg", "png")
LABEL_KEYS = ("labels", "label", "targets", "target", "y", "cls", "class", "fine_label")


def as_batches(data: Any, batch_size: int = BATCH_SIZE, pair: bool = False) -> Iterable[Any]:
    """Return what a user gave as an iterable of batches, cut where all images come at once; a loader as it is.

    With ``pair`` two arrays are images and labels, whatever their shapes; otherwise they may be two batches of images.
    """
    if (whole := _whole(data, pair)) is not None:
        images, labels = whole
        found = 1 if getattr(labels, "ndim", 1) == 0 else len(images if labels is None else labels)
        if found != len(images):
            raise DataError(f"{len(images)} images and {found} labels: each image needs one")
        cuts = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]
        return [images[cut] if labels is None else (images[cut], labels[cut]) for cut in cuts]
    if isinstance(data, (str, bytes, Path)):
        raise DataError(f"{data!r} is a path: open it, as with meansparse_fx.data.load_images(path).loader(128)")
    samples = isinstance(data, Sequence) and len(data) > 0 and is_sample(data[0])
    if samples or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
        return DataLoader(data, batch_size, collate_fn=collate)
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise DataError(f"{type(data).__name__} is no loader: give a DataLoader, a Dataset, or (images, labels)")
    return data


def collect_samples(batches: Iterable[Any], batch_size: int = BATCH_SIZE) -> Iterator[Any]:
    """Yield the batches of a loader; if it yields single images with their labels, yield batches of these."""
    single: list[Any] = []
    for element in batches:
        if is_sample(element):
            single.append(element)
        else:
            yield element
        if len(single) == batch_size:
            yield collate(single)
            single = []
    if single:
        yield collate(single)


def length(data: Any) -> int | None:
    """Return how many batches a loader says it has; None if it does not."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except (TypeError, NotImplementedError):  # a DataLoader has __len__, its IterableDataset need not
        return None


def count(loader: Sequence[Any]) -> int | None:
    """Return how many images a list of batches holds; None if that does not show."""
    found = [parts(batch)[0] for batch in loader]
    return sum(len(images) for images in found) if all(is_array(i) and i.ndim for i in found) else None


def nothing_in(data: Any) -> str:
    """Return that there are no images in ``data``, and why that may be."""
    if isinstance(data, Iterator):
        return "no images: a generator or iterator can be read once only, and this one is used up: give a DataLoader"
    return "no images: the loader yielded none (where it reads from a generator: that can be read once only)"


def parts(batch: Any) -> tuple[Any, Any]:
    """Return what holds the images of a batch, and what holds its labels, None if nothing does.

    By name in a mapping, a dataclass or a named tuple; else the first is the images and the second the labels.
    """
    names = getattr(batch, "_fields", None)  # of a named tuple
    if is_dataclass(batch) and not isinstance(batch, (type, Mapping)):
        batch = {field.name: getattr(batch, field.name) for field in fields(batch)}
    elif isinstance(names, tuple) and {name.lower() for name in names} & {*IMAGE_KEYS}:
        batch = dict(zip(names, batch, strict=True))
    if isinstance(batch, Mapping):
        return _named(batch, IMAGE_KEYS, "images"), _named(batch, LABEL_KEYS, "labels")
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if not batch:
        raise DataError("the loader yielded an empty tuple or list where a batch was expected")
    images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if isinstance(images, Mapping):
        images = _named(images, IMAGE_KEYS, "images")
    return images, _named(labels, LABEL_KEYS, "labels") if isinstance(labels, Mapping) else labels


def is_sample(element: Any) -> bool:
    """Return whether something is one image with its label, and no batch."""
    if not isinstance(element, (tuple, list, Mapping)):
        return False
    image, label = parts(element)
    scalar = isinstance(label, (int, float, str, np.generic)) or getattr(label, "ndim", None) == 0
    return scalar and not (getattr(image, "ndim", 0) == 4 and len(image) == 1)


def collate(samples: list[Any]) -> Any:
    """Return images with their labels as a batch."""
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as error:
        cure = "give the data set a transform such as ToTensor()" if isinstance(error, TypeError) else "resize them"
        raise DataError(f"images that make no batch, {cure}: {first_line(error)}") from error


def _whole(data: Any, pair: bool) -> tuple[Any, Any] | None:
    """Return (images, labels or None) if ``data`` is all images at once; None if it is a loader."""
    if is_array(data):
        return data, None
    if isinstance(data, Mapping):
        return parts(data)
    if not isinstance(data, (tuple, list)) or len(data) < 2 or not is_array(data[0]):
        return None
    images, labels = parts(data)
    if pair and len(data) == 2:
        if getattr(labels, "ndim", 1) == 0 and images.ndim < 4:
            raise DataError("one image and its label, where batches were expected: images[None], labels[None]")
        return images, labels
    if is_array(labels):
        return (images, labels) if labels.ndim < images.ndim and labels.ndim in (1, 2) else None
    numbers = isinstance(labels, Sequence) and all(isinstance(label, (int, np.integer)) for label in labels)
    return (images, labels) if numbers else None


def _named(batch: Mapping[Any, Any], known: Sequence[str], what: str) -> Any:
    """Return the one value whose key says that it is ``what``."""
    found = [key for key in batch if str(key).lower() in known]
    if len(found) == 1:
        return batch[found[0]]
    if not found and what == "labels":
        return None
    problem = f"which of {', '.join(map(repr, found))} are the" if found else "none of them says that it is the"
    raise DataError(f"a batch with the keys {', '.join(map(repr, batch))}: {problem} {what}; yield (images, labels)")


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a tensor or a NumPy array."""
    return isinstance(value, (Tensor, np.ndarray))


def as_tensor(value: Any, what: str) -> Tensor:
    """Return a tensor, an array or a list of numbers as a plain tensor; DataError says ``what`` it should have been."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            kind = "the meta device" if value.is_meta else value.dtype if value.is_quantized else value.layout
            kind = "several sizes (nested)" if value.is_nested else kind
            raise DataError(f"{what} of {kind} hold no plain values: give dense tensors (.to_dense(), .dequantize())")
        return value if type(value) is Tensor else value.detach().as_subclass(Tensor)
    try:
        array = np.asarray(value) if isinstance(value, (list, tuple, int, float, np.generic)) else value
    except ValueError:  # rows of unequal lengths
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        cure = "give class numbers" if what == "labels" else "yield (images, labels), images as ToTensor() makes them"
        kind = type(value).__name__
        if isinstance(array, np.ndarray) and array.dtype.kind in "US" and array.size:
            kind = f"words ({array.flat[0]}, ...)"
        raise DataError(f"the loader yielded {kind} where a tensor of {what} was expected: {cure}")
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
