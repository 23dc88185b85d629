"""Floor 1: copies of models: as `copy.deepcopy` makes them, several times as fast, and without what it forgets.

Most of a module's state are empty dictionaries of hooks, each of which deepcopy takes apart by the pickle protocol. It
forgets the hooks of parameters and, of graphs, the eval mode; and it refuses tensors that an earlier forward computed
with gradients. Knows modules and Python; nothing of what a graph computes.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import CaptureError
from .hooks import STATE, has_hooks, may_keep
from .outputs import same_values

_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, types.FunctionType}
    | {torch.jit.ScriptFunction, torch.library.CustomOpDef}
)

# What a module's own way of copying may forget, while its author means none of it.
_KEPT = ("training", "_non_persistent_buffers_set", *STATE)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy.

    Of what earlier calls left in the model, tensors with gradients behind them, the copy has the values alone; those
    in a dict, a cache that the model fills when it needs it, are left out. Modules under torch.compile come without.

    Args:
        model: Of any class; those that say themselves how they are copied are asked, and their copies compared.
        memo: As `copy.deepcopy` takes it: what is shared instead of copied, by its id.

    Raises:
        CaptureError: A part of it refuses, or is not the same when copied.
    """
    memo = dict(memo or {})
    memo |= _overlapping(model, memo)
    memo |= {id(p): _copied_parameter(p) for p in model.parameters() if id(p) not in memo and type(p) is nn.Parameter}
    try:
        try:
            own = _copied(model, dict(memo))
        except RuntimeError:  # a tensor that is no leaf, inside of what copies itself
            own = _copied(model, memo | {id(t): t.detach().clone() for t in _results(model, set())})
        _compare(model, own, "", set())
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): take out what it holds "
            "besides modules, tensors and plain data, such as open files, locks or generators"
        ) from error
    return own


def shadow(model: nn.Module) -> nn.Module:
    """Return a copy that shares the model's parameters, which neither tracing nor inference changes."""
    return copied(model, {id(p): p for p in model.parameters()})


@contextmanager
def copied_leaves(graph_module: fx.GraphModule) -> Iterator[None]:
    """Put copies in the place of modules that the graph calls and that may keep what they are given."""
    replaced = []
    for target in dict.fromkeys(node.target for node in graph_module.graph.find_nodes(op="call_module")):
        path, _, name = str(target).rpartition(".")
        owner = graph_module.get_submodule(path)
        module = owner.get_submodule(name)
        if may_keep(module):
            replaced.append((owner, name, module))
    try:
        for owner, name, module in replaced:
            owner._modules[name] = shadow(module)
        yield
    finally:
        for owner, name, module in replaced:
            owner._modules[name] = module


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given, of what it returned; any other as it is.

    Raises:
        CaptureError: The wrapper has hooks, which would go with it.
    """
    # By name, because looking OptimizedModule up imports the compiler.
    while type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch."):
        wrapped = module.get_submodule("_orig_mod")
        refuse_hooks(module, wrapped)
        module = wrapped
    return module


def refuse_hooks(wrapper: nn.Module, wrapped: nn.Module) -> None:
    """Raise CaptureError if a wrapper that is taken off has hooks."""
    if has_hooks(wrapper):
        raise CaptureError(
            f"{type(wrapper).__name__} has hooks, and is taken off the {type(wrapped).__name__} in it: register them "
            "on that module"
        )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if (known := memo.get(id(value))) is not None:
        return known
    if kind is dict or kind is OrderedDict:
        memo[id(value)] = own = kind()
        for key, item in value.items():
            if not _is_result(item):
                own[_copied(key, memo)] = _copied(item, memo)
        return own
    if kind is list:
        memo[id(value)] = items = list[Any]()
        items.extend(_copied(item, memo) for item in value)
        return items
    if isinstance(value, nn.Module):
        return _copied_module(value, memo)
    if _is_result(value):
        memo[id(value)] = own = value.detach().clone()
        return own
    return copy.deepcopy(value, memo)


def _copied_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kind = type(module)
    if (wrapped := unwrapped(module)) is not module:
        memo[id(module)] = own = _copied(wrapped, memo)
        return own
    if isinstance(module, fx.GraphModule):
        memo[id(module)] = own = kind.__new__(kind)  # of a new class, which gets the graph's code
        type(own).__name__ = kind.__name__
        own.__dict__.update(_copied_state(nn.Module.__getstate__(module), memo))
        own.graph = own._graph
        return own
    if isinstance(module, torch.jit.ScriptModule):
        with torch.no_grad():  # or its parameters would be results of theirs
            memo[id(module)] = own = copy.deepcopy(module, memo)
        for parameter, copied_one in zip(module.parameters(), own.parameters(), strict=True):
            copied_one.requires_grad_(parameter.requires_grad)
        return own
    if not _is_plain(kind):  # type: ignore[arg-type]
        return copy.deepcopy(module, memo)
    memo[id(module)] = own = kind.__new__(kind)
    own.__setstate__(_copied_state(module.__getstate__(), memo))
    return own


def _copied_state(state: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    own = {key: _copied(item, memo) for key, item in state.items()}
    for key, buffer in state["_buffers"].items():  # registered ones are state, wherever they come from
        own["_buffers"][key] = _copied(buffer, memo)
    return own


def _copied_parameter(parameter: nn.Parameter, data: Tensor | None = None) -> nn.Parameter:
    """Return a copy with what `copy.deepcopy` forgets: hooks, and attributes."""
    own = copy.deepcopy(parameter) if data is None else nn.Parameter(data, parameter.requires_grad)
    own.__dict__.update(parameter.__dict__)
    hooks = tuple((parameter._backward_hooks or {}).values())
    later = tuple((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())
    if hooks or later:
        own.requires_grad_(True)  # or it takes none
        for hook in hooks:
            own.register_hook(hook)
        for hook in later:
            own.register_post_accumulate_grad_hook(hook)
        own.requires_grad_(parameter.requires_grad)
    return own


def _overlapping(model: nn.Module, memo: dict[int, Any]) -> dict[int, Tensor]:
    """Return copies, by id, of parameters that lie in one memory with others: what is written to one is in all."""
    holders: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in {id(t): t for t in chain(model.parameters(), model.buffers())}.values():
        if id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            holders[tensor.untyped_storage()._cdata].append(tensor)
    copies: dict[int, Tensor] = {}
    for tensors in holders.values():
        if len(tensors) == 1 or not any(isinstance(t, nn.Parameter) for t in tensors) or not _overlap(tensors):
            continue
        memory = tensors[0].untyped_storage().clone()
        for t in tensors:
            data = t.detach().new_empty(0).set_(memory, t.storage_offset(), t.shape, t.stride())
            copies[id(t)] = _copied_parameter(t, data) if isinstance(t, nn.Parameter) else data
    return copies


def _overlap(tensors: list[Tensor]) -> bool:
    """Return whether two tensors of one memory share a part of it; in a file of weights they lie side by side."""
    end = -1
    for tensor in sorted(tensors, key=lambda t: t.storage_offset() * t.element_size()):
        start = tensor.storage_offset() * tensor.element_size()
        if start < end:
            return True
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        end = int(start + extent * tensor.element_size())
    return False


def _is_result(value: Any) -> bool:
    """Return whether a value is a tensor that was computed with gradients."""
    return isinstance(value, Tensor) and not value.is_leaf


def _results(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors computed with gradients in a value's attributes and items."""
    if _is_result(value):
        yield value
    elif type(value) not in _ATOMS and id(value) not in seen and not isinstance(value, Tensor | type):
        seen.add(id(value))
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        for item in chain(items, getattr(value, "__dict__", {}).values()):
            yield from _results(item, seen)


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Return whether such a module is copied and pickled as `nn.Module` itself is."""
    said = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in said)


def _compare(module: nn.Module, own: nn.Module, path: str, seen: set[int], doubted: bool = False) -> None:
    """Give copies what a module's own way of copying forgot; raise CaptureError where that is not enough."""
    module = unwrapped(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, torch.jit.ScriptModule):
        return
    plain = _is_plain(type(module))  # type: ignore[arg-type]
    doubted = doubted or not (plain or isinstance(module, fx.GraphModule))
    if doubted:
        _restore_state(module, own, f"{path or 'the model'} ({type(module).__name__})")
    for name, child in module._modules.items():
        if child is not None and (own_child := own._modules[name]) is not None:
            _compare(child, own_child, f"{path}.{name}" if path else name, seen, doubted)


def _restore_state(module: nn.Module, own: nn.Module, where: str) -> None:
    if own is module:
        raise CaptureError(
            f"{where} returns itself when it is copied, and a transformed copy would change it: remove its __deepcopy__"
        )
    for name in _KEPT:
        before, after = module.__dict__.get(name), own.__dict__.get(name)
        same = len(before) == len(after) if isinstance(before, dict) and isinstance(after, dict) else before == after
        if not same:
            own.__dict__[name] = copy.copy(before)
    for kind in ("_modules", "_parameters", "_buffers"):
        before, after = getattr(module, kind), getattr(own, kind)
        if [(k, v is None) for k, v in before.items()] != [(k, v is None) for k, v in after.items()]:
            raise CaptureError(f"{where} has other {kind[1:]} when it is copied: mend its __deepcopy__ or __getstate__")
        for name, tensor in before.items() if kind != "_modules" else ():
            if tensor is not None and not _same(tensor, after[name]):
                raise CaptureError(f"{where} has another {name} when it is copied: mend its __deepcopy__")


def _same(tensor: Tensor, own: Tensor) -> bool:
    if tensor is own:
        return True
    form, other = ((t.shape, t.dtype, t.device, t.is_leaf and t.requires_grad) for t in (tensor, own))
    return form == other and (tensor.is_meta or same_values(tensor.detach(), own.detach()))
