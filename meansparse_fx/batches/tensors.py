"""Floor 1: tensors, arrays and lists of numbers as plain tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a tensor or a NumPy array."""
    return isinstance(value, (Tensor, np.ndarray))


def as_tensor(value: Any, what: str) -> Tensor:
    """Return a tensor, an array or a list of numbers as a plain tensor; subclasses of Tensor become one.

    Raises:
        DataError: It is something else; ``what`` it should be is said.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "the meta device" if value.is_meta else value.dtype if value.is_quantized else value.layout
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
