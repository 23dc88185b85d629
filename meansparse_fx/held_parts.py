"""Floor 1: plain attributes that a model's forward reads, and modules that a graph does not call: the graph has them as
they were. They are noted while a model is traced, and have to stay what they were. Imports torch and errors only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from .errors import StateError

_ATOMS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_PLAIN = (*_ATOMS, list, tuple, dict)
_OF_EVERY_MODULE = {*dir(nn.Module), *vars(nn.Module())}
_PACKAGE = __name__.partition(".")[0]


@contextmanager
def attributes_noted(note: Callable[[nn.Module, str, Any], None]) -> Iterator[None]:
    """Call ``note`` with module, name and value where a model's code reads a plain attribute, a constant to a graph."""
    thread = threading.get_ident()

    def look_up(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name not in _OF_EVERY_MODULE and name in object.__getattribute__(module, "__dict__"):
            reader = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if reader != _PACKAGE and threading.get_ident() == thread:
                note(module, name, value)
        return value

    with mock.patch.object(nn.Module, "__getattribute__", look_up, create=True):
        yield


class HeldParts:
    """Plain attributes and children of modules that a graph does not follow: they have to stay what they are now."""

    def __init__(self) -> None:
        # Path and module, None for the model itself, which no part can hold; name, value, and whether that is a child.
        self._parts: list[tuple[str, nn.Module | None, str, Any, bool]] = []

    def hold(self, path: str, module: nn.Module | None, parts: Mapping[str, Any], children: bool = False) -> None:
        """Hold some of a module's attributes, or of its children; the module is None if it is the model itself."""
        self._parts += [(path, module, n, v if children else _comparable(v), children) for n, v in parts.items()]

    def check(self, model: nn.Module) -> None:
        """Raise StateError if one is another by now."""
        for path, module, name, value, child in self._parts:
            if child:
                now = (model if module is None else module)._modules.get(name)
            else:
                now = getattr(model, name, value) if module is None else module.__dict__.get(name, value)
            if now is not value and not (isinstance(value, _PLAIN) and _comparable(now) == value):
                where, was = f"{path}: " * bool(path), "another module" if child else f"{value!r}"
                raise StateError(
                    f"{where}{name} was {was} when the model was transformed, and is {now!r} now, and the graph has "
                    "the former: set it in the base model, and transform that"
                )


def _comparable(value: Any) -> Any:
    """Return what tells whether a value, or a plain one in it, has become another; what is not plain as it is."""
    if type(value) is tuple and all(isinstance(item, _ATOMS) for item in value):
        return value
    if type(value) in (list, tuple):
        return [_comparable(item) if isinstance(item, _PLAIN) else None for item in value]
    if type(value) is dict:
        return {key: _comparable(item) for key, item in value.items() if isinstance(item, _PLAIN)}
    if hasattr(value, "__dict__") and not callable(value):  # a configuration, which holds much that nobody reads
        return {name: item for name, item in vars(value).items() if isinstance(item, _ATOMS)}
    return value
