"""Floor 2: what gradients of a tensor that depends on no image would go through. Imports torch and `dispatched`."""

from __future__ import annotations

import hashlib
import types
from typing import Any

from torch import Tensor

from .dispatched import storage


class Histories:
    """Describes the parts of autograd's graph that parameters alone are in.

    Args:
        names: Of parameters and buffers, by their storage.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._known: dict[int, tuple[bytes, Any]] = {}  # by id of a node, with the node, or another would get its id

    def of(self, tensor: Tensor) -> tuple:
        """Return nothing for a tensor that wants no gradient, else its hooks and where its gradient goes."""
        if not tensor.requires_grad:
            return ()
        hooks = tuple(map(hook_term, (tensor._backward_hooks or {}).values()))
        return (*hooks, b"" if tensor.grad_fn is None else self._digest(tensor.grad_fn))

    def _digest(self, node: Any) -> bytes:
        """Return what only nodes share that come from the same operators and parameters."""
        if id(node) not in self._known:
            leaf = getattr(node, "variable", None)
            name = self._names.get(storage(leaf)) if isinstance(leaf, Tensor) else None
            sources = [None if n is None else (self._digest(n), index) for n, index in node.next_functions]
            description = f"{type(node).__module__}.{type(node).__qualname__}", node.name(), name, sources
            self._known[id(node)] = hashlib.sha256(repr(description).encode()).digest(), node
        return self._known[id(node)][0]


def hook_term(hook: Any) -> Any:
    """Return what stands for a tensor hook: a function that is defined anew at each call is the same."""
    if type(hook) is not types.FunctionType:
        return hook
    return hook.__code__, hook.__defaults__, tuple(cell.cell_contents for cell in hook.__closure__ or ())
