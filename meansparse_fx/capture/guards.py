"""Floor 2: for which batches a graph holds that examples answered for: the calls in it that refuse others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError

BATCH_SIZES = (2, 3)  # of the examples: two that differ, and neither is 1, which broadcasts


def expect_size(images: Tensor, size: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise CaptureError unless ``images`` are ``[N, *size]``, of a dtype that forward asked for.

    First call of a graph that holds for one size only.
    """
    if tuple(images.shape[1:]) != size:
        raise CaptureError(
            f"this graph was captured for images of shape {['N', *size]} and got {list(images.shape)}: "
            "capture the model again with example images of that size"
        )
    if dtype is not None and images.dtype != dtype:
        raise CaptureError(
            f"forward asks for a dtype, was answered {dtype} when this graph was captured, and the images are "
            f"{images.dtype}: transform the model as it is in that dtype, with example images of it"
        )


def expect_answer(number: Any, answer: Any, line: str) -> None:
    """Raise CaptureError unless a number of this batch is, or is as true as, what the example batches agreed on."""
    if not ((number if answer else not number) if isinstance(answer, bool) else number == answer):
        raise CaptureError(
            f"the model decides by the number of images, {line}, and the graph holds for batches that give what 2 and "
            "3 images give there: pass such batches, or write that line without the batch size"
        )


class SizeWatch(TorchDispatchMode):
    """Notices operators whose result has a size that depends on values. Examples without data cannot have them."""

    def __init__(self) -> None:
        super().__init__()
        self.depends_on_values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        masked = any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        self.depends_on_values |= masked or torch.Tag.dynamic_output_shape in func.tags
        return func(*args, **(kwargs or {}))
