"""Floor 5: counts the calls of operators and the bytes they move, and what autograd keeps. Imports torch only.

Works on tensors without data (device ``meta``) as on any other: only shapes and types are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

# They launch nothing: allocations, and a view that torch does not call one.
_FREE = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
}


class Tally(TorchDispatchMode):
    """While it is active, counts calls of operators: each reads its inputs once and writes its results once.

    Views, and allocations that are not filled, are no calls. Tensors of fewer elements than ``smallest`` move nothing:
    numbers, and vectors of one value a channel. ``read`` and ``written`` are bytes.
    """

    def __init__(self, smallest: int = 0) -> None:
        super().__init__()
        self.smallest = smallest
        self.calls = self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and name not in _FREE:
            self.calls += 1
            # A norm's backward in eval mode does not look at its input, where parameters want no gradients.
            scales = name == "aten::native_batch_norm_backward" and not args[-3] and not any(args[-1][1:])
            self.read += self._bytes((args, kwargs), unread=1 if scales else 0)
            self.written += self._bytes(result)
        return result

    def _bytes(self, values: Any, unread: int = 0) -> int:
        # By storage, so that a tensor that is given twice is read once.
        tensors = {
            t.untyped_storage()._cdata: t.numel() * t.element_size()
            for t in pytree.tree_leaves(values)
            if isinstance(t, Tensor) and t.numel() >= self.smallest
        }
        sizes = list(tensors.values())
        return sum(sizes[: len(sizes) - unread])


class _Kept:
    """Stands for a tensor in autograd's graph, and lives as long as the graph needs that tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(call: Callable[[], object], state: Iterable[Tensor] = (), smallest: int = 0) -> int:
    """Return the bytes that autograd keeps for backward of what a call returns.

    Each storage counts once and whole. What only passing steps had kept, such as the input of a comparison, is gone
    by then and counts nothing, nor do tensors of fewer elements than ``smallest``, and ``state``: what is there anyway.
    """
    alive: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive[kept] = None
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = call()  # keeps the graph while its tensors are counted
    tensors = [kept.tensor for kept in alive if kept.tensor.numel() >= smallest]
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    for tensor in state:
        found.pop(tensor.untyped_storage()._cdata, None)
    del result
    return sum(found.values())
