"""Floor 1: labels of any form as class numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .loaders import as_tensor


def class_numbers(labels: Any, count: int, ignore_index: int | None = None) -> tuple[Tensor, int | None]:
    """Return labels as ``[N]`` int64, or label maps ``[N, H, W]``, and their number of classes if they were one-hot.

    Args:
        labels: ``[N]`` or ``[N, 1]`` of any integer dtype, or one-hot ``[N, K]``; tensor, array or list.
        ignore_index: Of pixels to leave out, which become -1, if maps ``[N, H, W]`` or ``[N, 1, H, W]`` may be given.
    """
    if isinstance(labels, (list, tuple)) and any(isinstance(label, Tensor) for label in labels):
        labels = torch.stack([torch.as_tensor(label) for label in labels])
    found = as_tensor(labels, "labels")
    shape, classes = list(found.shape), None
    if found.is_complex():
        raise DataError(f"labels must be integers from 0, found {found.dtype}")
    if found.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operators know them
        found = found.to(torch.int64)
    if found.dim() == 0:
        found = found.reshape(1)
    elif found.dim() == 2 and shape[1] == 1:
        found = found.squeeze(1)
    maps = found.dim() == 3 or (found.dim() == 4 and shape[1] == 1)
    if ignore_index is not None and maps and len(found) == count:
        if found.is_floating_point():
            raise DataError(f"label maps must be integers from 0, found {found.dtype}: read them without scaling")
        found = found.reshape(count, *shape[-2:]).to(torch.int64)
        if bool(((found < 0) & (found != ignore_index)).any()):
            raise DataError(f"label {int(found.min())} in a map; pixels left out have {ignore_index}: ignore_index=")
        return found.masked_fill(found == ignore_index, -1), None
    if found.dim() not in (1, 2) or len(found) != count:
        raise DataError(f"labels {shape} for {count} images: expected [{count}], one class number an image")
    if found.dim() == 2:
        one_hot = ((found == 0) | (found == 1)).all(1) & ((found != 0).sum(1) == 1)
        if not bool(one_hot.all()):
            raise DataError(
                f"labels {shape} are neither class numbers nor one-hot rows: soft labels and several labels an image "
                "have no single right class; give labels.argmax(1) if that is what counts as right"
            )
        found, classes = (found != 0).to(torch.uint8).argmax(1), shape[1]
    if found.is_floating_point():
        raise DataError(f"labels must be integers from 0, found {found.dtype}: labels.long() if those are meant")
    return found.to(torch.int64), classes


def out_of_range(labels: Tensor, classes: int, first: int = 0) -> str | None:
    """Return in words what is wrong with the first label that has no logit, ``first`` images after the first of all.

    Maps ``[N, H, W]`` have -1 where pixels are left out. None if all labels have a logit.
    """
    wrong = (labels < 0 if labels.dim() == 1 else labels < -1) | (labels >= classes)
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return (
        f"image {first + at[0]}: label {int(labels[at])} is out of range for a model of {classes} classes, "
        f"labelled 0 to {classes - 1}; is it another data set's model?"
    )
