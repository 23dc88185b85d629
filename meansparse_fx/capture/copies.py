"""Floor 2: copies of models, as `copy.deepcopy` makes them and several times as fast.

Most of a module's state are empty dictionaries of hooks, each of which deepcopy takes apart by the pickle protocol.
Knows modules and Python; nothing of graphs.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any

from torch import nn

from ..errors import CaptureError

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, types.FunctionType})


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy.

    Args:
        model: Of any class; those that say themselves how they are copied are asked.
        memo: As `copy.deepcopy` takes it: what is shared instead of copied, by its id.

    Raises:
        CaptureError: A part of it refuses.
    """
    try:
        return _copied(model, {} if memo is None else memo)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error})") from error


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if (known := memo.get(id(value))) is not None:
        return known
    if kind is dict or kind is OrderedDict:
        memo[id(value)] = own = kind()
        for key, item in value.items():
            own[_copied(key, memo)] = _copied(item, memo)
        return own
    if isinstance(value, nn.Module) and _is_plain(kind):
        memo[id(value)] = own = kind.__new__(kind)
        own.__setstate__({key: _copied(item, memo) for key, item in value.__getstate__().items()})
        return own
    return copy.deepcopy(value, memo)


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Return whether such a module is copied and pickled as `nn.Module` itself is."""
    said = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in said)
