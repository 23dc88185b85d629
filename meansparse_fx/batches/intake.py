"""Floor 1: batches made ready for a model: dtype and range of the images, labels among its classes."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, first_line
from .labels import class_numbers, out_of_range
from .loaders import as_batches, as_tensor, collate, collect_samples, is_array, is_sample, nothing_in, parts

_CHANNELS = (1, 3, 4)
_MOST_OF_NORMALISED = 16.0  # no usual normalisation makes values as large, and images of bytes all have larger ones


def labelled(
    data: Any, batch_size: int, model: nn.Module, ignore_index: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images ``[N, C, H, W]`` in [0, 1] and labels ``[N]`` int64, each a class of the model.

    Args:
        data: A loader of batches, ``(images, labels)``, a Dataset: docs/data.md lists what is understood.
        batch_size: Where ``data`` does not come in batches.
        ignore_index: Of pixels to leave out, if labels may be maps: these are yielded as ``[N, H, W]``, there with -1.
    """
    intake, count = Intake(model, ignore_index), 0
    for batch in collect_samples(as_batches(data, batch_size, pair=True), batch_size):
        images, labels = intake.pair(batch)
        if len(images):
            yield images, labels
        count += len(images)
    if not count:
        raise DataError(nothing_in(data))


def examples(images: Any, model: Any) -> Any:
    """Return example images as a tensor, floats in a dtype that the model takes: their values do not matter."""
    if images is None or not isinstance(model, nn.Module):
        return images
    if not is_array(images):
        cure = "the first of them" if isinstance(images, (tuple, list)) else "a batch's images"
        raise DataError(f"example images must be a tensor [N, C, H, W], got {type(images).__name__}: give {cure} alone")
    if not isinstance(images, Tensor):
        images = as_tensor(images, "images")
    return Intake(model).cast(images) if images.is_floating_point() else images


def cycled(images: Tensor, count: int) -> Tensor:
    """Return ``count`` of the images, from the first on again where there are too few."""
    return images[[row % len(images) for row in range(count)]]


@contextmanager
def explaining_misfit(images: Tensor) -> Iterator[None]:
    """Let the error of a model that cannot take images say which images these are, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        shape, problem = list(images.shape), first_line(error)
        if images.dim() == 4 and shape[3] in _CHANNELS and shape[1] not in _CHANNELS:
            raise DataError(f"images {shape} have their channels last: images.permute(0, 3, 1, 2)") from error
        if images.dim() == 3:
            cure = "image.unsqueeze(0) is a batch of one image, images.unsqueeze(1) has an axis of one channel"
        elif "channels" in problem and images.dim() == 4 and shape[1] in _CHANNELS:
            cure = "images.mean(1, keepdim=True) has one channel, images.expand(-1, 3, -1, -1) three of one"
        elif "type" in problem and "same" in problem:
            cure = "its weights are of another dtype, and attacks compute in float32: transform model.float()"
        else:
            cure = "give images such as the model was trained on; a loader yields (images, labels), in that order"
        raise DataError(f"the model fails on images {shape} of {images.dtype} ({problem}): {cure}") from error


class Intake:
    """Takes the batches of one loader, one after the other; ``ignore_index`` is that of `labelled`."""

    def __init__(self, model: nn.Module, ignore_index: int | None = None) -> None:
        self._model, self._ignore_index = model, ignore_index
        self._dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
        floats = torch.float32 in self._dtypes
        self._standard = torch.float32 if floats else max(self._dtypes, key=lambda d: d.itemsize)
        self._classes: int | None = None
        self._scaled = False
        self._images = 0  # taken

    def images(self, batch: Any) -> Tensor:
        """Return the images of a batch, of which the labels do not matter, in a dtype that the model takes."""
        images = self._floats(_parts(batch)[0])
        if not self._images and _like_bytes(images):
            raise DataError(
                f"images of {images.dtype} from {float(images.min()):g} to {float(images.max()):g}: expected [0, 1]; "
                "divide them by 255, or put what divides them into the model, in front"
            )
        self._images += len(images) if images.dim() else 0
        return images

    def pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] and labels ``[N]`` or ``[N, H, W]`` int64 of a batch."""
        raw, raw_labels = _parts(batch)
        if raw_labels is None:
            raise DataError("the loader must yield (images, labels) batches, and there are no labels in this one")
        images = self._floats(raw)
        images = images.float() if images.is_floating_point() else images  # in which attacks compute
        if images.dim() < 2 or not images.is_floating_point() or (len(images) and not images.numel()):
            raise DataError(f"images {list(images.shape)} of {images.dtype}: expected floats [N, C, H, W] in [0, 1]")
        if len(images):
            low, high = (float(value) for value in images.aminmax())
            if not (low >= 0 and high <= 1):
                cure = "divide them by 255" if _like_bytes(images) else "put the normalisation into the model"
                found = f"found {low:.3f} to {high:.3f}"
                raise DataError(f"images must be in [0, 1] ({found}): eps has no meaning otherwise; {cure}")
        labels, classes = class_numbers(raw_labels, len(images), self._ignore_index)
        if len(images):
            self._require_classes(images, labels, classes)
        self._images += len(images)
        return images, labels

    def cast(self, images: Tensor) -> Tensor:
        """Return images of floats in a dtype that the model takes."""
        # float32 goes into models of half precision as it is: some cast it themselves.
        half = images.dtype == torch.float32 and self._standard.itemsize < 4
        return images if images.dtype in self._dtypes or half else images.to(self._standard)

    def _floats(self, raw: Any) -> Tensor:
        """Return images as floats of the model's dtype; whole numbers of up to two dimensions stay what they are."""
        if isinstance(raw, (list, tuple)) and raw and all(map(is_array, raw)):
            raw = collate(list(raw))
        images = as_tensor(raw, "images")
        if images.dtype == torch.uint8:
            if not self._scaled:
                warnings.warn("images of uint8: scaled by 1/255 to [0, 1]", stacklevel=2)
            self._scaled = True
            return images.to(self._standard) / 255
        if images.is_floating_point():
            return self.cast(images)
        if images.is_complex() or images.dim() > 2:
            raise DataError(
                f"images of {images.dtype}: expected floats in [0, 1], or uint8, which is scaled by 1/255: for whole "
                "numbers up to 255, images.to(torch.uint8)"
            )
        return images

    def _require_classes(self, images: Tensor, labels: Tensor, one_hot: int | None) -> None:
        """Raise DataError if a label is none of the model's; how many there are is asked once, with two images."""
        if self._classes is None:
            place = next(itertools.chain(self._model.parameters(), self._model.buffers()), images).device
            with torch.no_grad(), explaining_misfit(images):
                logits = self._model(images[:2].to(place))
            if not isinstance(logits, Tensor) or logits.dim() != (4 if labels.dim() == 3 else 2):
                return  # what runs the model says what it needs
            self._classes = logits.shape[1]
        if one_hot is not None and one_hot != self._classes:
            raise DataError(f"one-hot labels of {one_hot} classes for a model of {self._classes}: another data set's?")
        if problem := out_of_range(labels, self._classes, self._images):
            left_out = f" Left out: {self._ignore_index} (ignore_index=)" if labels.dim() == 3 else ""
            raise DataError(problem + left_out)
        unlabelled = (labels < 0).reshape(len(labels), -1).all(1)
        if bool(unlabelled.any()):
            raise DataError(f"image {self._images + int(unlabelled.nonzero()[0])} has no labelled pixel: leave it out")


def _parts(batch: Any) -> tuple[Any, Any]:
    """Return what holds the images and what the labels of a batch, also of one that is a list of single images."""
    listed = isinstance(batch, (list, tuple)) and batch and is_sample(batch[0])
    return parts(collate(list(batch)) if listed else batch)


def _like_bytes(images: Tensor) -> bool:
    """Return whether images look as if they went to 255."""
    if not (images.is_floating_point() and images.dim() == 4 and images.shape[1] in (1, 3, 4) and images.numel()):
        return False
    low, high = (float(value) for value in images.aminmax())
    return low >= 0 and high > _MOST_OF_NORMALISED
