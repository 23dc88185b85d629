"""Floor 1: what runs when a module is called, besides its class's forward: hooks, and a forward of its own.

torch.fx follows a module's code, and with it a hook that is a part of the model: a method of it, or an object, as
weight norms are. A hook that is a plain function belongs to whoever registered it. It may keep what it sees, so it has
to run whenever the model does, not once while it is traced: the graph calls it, by `enter` and `leave`.

Imports torch and errors only.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree
from torch.utils.hooks import BackwardHook

from .errors import CaptureError, StateError

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
RUNNING = (*FORWARD, *_BACKWARD)

_LIBRARIES = {"torch", "torchvision", "timm", "robustbench"}

# What of a module's state its hooks are.
STATE = (
    *RUNNING,
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module, or differentiating the call, runs hooks."""
    held = module.__dict__
    return any(len(held.get(kind, ())) for kind in RUNNING)


def may_keep(module: nn.Module) -> bool:
    """Return whether a module that a graph calls may keep what it is given: a library's own, or one with hooks."""
    return has_hooks(module) or not type(module).__module__.startswith("torch.nn.")


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module computes something else than its class, as its author wrote it.

    Its forward is the instance's own, or somebody put one into a class of a library.
    """
    if "forward" in module.__dict__:
        return True
    owner = next(c for c in type(module).__mro__ if "forward" in c.__dict__)
    if owner.__module__.partition(".")[0] not in _LIBRARIES:
        return False
    home = getattr(sys.modules[owner.__module__], "__file__", None)
    code = getattr(owner.__dict__["forward"], "__code__", None)
    return code is None or code.co_filename != home


def refuse_global_hooks() -> None:
    """Raise StateError if hooks are registered for all modules: a graph does not call all modules."""
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        hook = next(iter(getattr(torch_module, f"_global_{kind}_hooks").values()), None)
        if hook is not None:
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise StateError(
                f"hooks are registered for every module there is ({name}), and a graph "
                "calls only some of the model's: remove them (the handle that register_module_..._hook returned), or "
                "register them on the modules that are meant"
            )


def is_foreign(hook: Callable) -> bool:
    """Return whether a hook is a plain function: shared with copies of the model, and no part of it.

    Those by which transformers' models take hidden states out of their layers are part of the model.
    """
    function = _function(hook)
    plain = isinstance(function, types.FunctionType | types.BuiltinFunctionType)
    return plain and not str(function.__module__).startswith("transformers.")


def _function(hook: Callable) -> Callable:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def has_foreign_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that the graph has to call, if the module is traced into."""
    held = module.__dict__
    return any(held[kind] for kind in _BACKWARD) or any(is_foreign(h) for kind in FORWARD for h in held[kind].values())


def has_hooks_of_the_model(module: nn.Module) -> bool:
    """Return whether forward hooks of a module are methods or objects: what they keep the model may read later.

    Torch's own, such as weight norms, are none of them: they keep nothing but the module's weight.
    """
    hooks = [_function(hook) for kind in FORWARD for hook in module.__dict__[kind].values()]
    owners = [getattr(hook, "__self__", hook) for hook in hooks if not is_foreign(hook)]
    return any(not type(owner).__module__.startswith("torch.") for owner in owners)


def hint_of_hooks(model: nn.Module) -> str:
    """Return what to do about hooks if a copy of a model fails that has some which are plain functions, else nothing.

    They are shared: what they keep is kept in the model itself, and not in the copy.
    """
    if not any(map(has_foreign_hooks, model.modules())):
        return ""
    return (
        "; hooks that are plain functions belong to the model and not to its copies: "
        "if forward reads what one of them keeps, make that hook a method of the model"
    )


@contextmanager
def only_own_hooks(module: nn.Module) -> Iterator[None]:
    """Take the hooks off that `enter` and `leave` run."""
    before = {kind: module.__dict__[kind] for kind in RUNNING}
    try:
        for kind in FORWARD:
            module.__dict__[kind] = OrderedDict((i, h) for i, h in before[kind].items() if not is_foreign(h))
        for kind in _BACKWARD:
            module.__dict__[kind] = OrderedDict()
        yield
    finally:
        module.__dict__.update(before)


def drop_own_hooks(module: nn.Module) -> None:
    """Remove the hooks that were traced with the module, so that those are left which `enter` and `leave` run."""
    for kind in FORWARD:
        hooks = module.__dict__[kind]
        for number in [i for i, hook in hooks.items() if not is_foreign(hook)]:
            del hooks[number]


def enter(given: tuple[tuple, dict], module: nn.Module) -> tuple[tuple, dict, BackwardHook | None]:
    """Run the hooks before a module's forward; return its arguments, and what `leave` needs for backward hooks.

    As `nn.Module.__call__` does it.

    Args:
        given: Positional and keyword arguments of the call.
        module: In a graph that has the calls which its forward makes, instead of its own.

    Raises:
        CaptureError: A hook changes more of the arguments than tensors: the graph was traced with the others.
    """
    args, kwargs = before = _plain(given)
    for number, hook in module._forward_pre_hooks.items():
        if number in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if result is None else result
        else:
            result = hook(module, args)
            args = args if result is None else result if isinstance(result, tuple) else (result,)
    if not _alike(before, (args, kwargs)):
        raise CaptureError(f"a pre-hook of {type(module).__name__} changes arguments that are no tensors: remove it")
    full, _ = module._get_backward_hooks()
    pre = module._get_backward_pre_hooks()
    backward = BackwardHook(module, full, pre) if full or pre else None
    if backward is not None:
        args = backward.setup_input_hook(args)
    return args, kwargs, backward


def leave(result: Any, module: nn.Module, given: tuple[tuple, dict], backward: BackwardHook | None) -> Any:
    """Run the hooks behind a module's forward; return its result.

    Args:
        given: Positional and keyword arguments, as `enter` returned them.
    """
    args, kwargs = _plain(given)
    expected = result = _plain(result)
    for number, hook in module._forward_hooks.items():
        more = (kwargs,) if number in module._forward_hooks_with_kwargs else ()
        changed = hook(module, args, *more, result)
        result = result if changed is None else changed
    if not _alike(expected, result):
        raise CaptureError(
            f"a hook of {type(module).__name__} returns {type(result).__name__}, its forward "
            f"{type(expected).__name__}: the graph needs results of one structure; remove the hook"
        )
    if backward is not None:
        result = backward.setup_output_hook(result)
    _, legacy = module._get_backward_hooks()
    first = next((leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)), None) if legacy else None
    function = getattr(first, "grad_fn", None)
    if function is not None:
        for hook in legacy:
            function.register_hook(functools.partial(hook, module))
    return result


def parts_like(whole: Any, like: Any) -> Any:
    """Return ``like`` with the tensors of ``whole``, a value of the same structure, in the place of its own."""
    if isinstance(like, fx.Proxy):
        return whole
    if isinstance(like, dict):
        return {key: parts_like(whole[key], value) for key, value in like.items()}
    if type(like) in (tuple, list):
        return type(like)(parts_like(whole[i], value) for i, value in enumerate(like))
    if not isinstance(like, (type(None), bool, int, float, str, torch.dtype, torch.device)):
        raise CaptureError(f"a module with hooks takes or returns {type(like).__name__}: remove the hooks")
    return like


def entering(module: nn.Module, images: Tensor) -> Tensor:
    """Return what a model's forward gets for images, behind its pre-hooks."""
    if not module._forward_pre_hooks:
        return images
    (images, *_), _, _ = enter(((images,), {}), module)
    return images


def _plain(value: Any) -> Any:
    """Return containers in the place of those, immutable, that torch.fx's interpreter passes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _alike(before: Any, after: Any) -> bool:
    """Return whether two values are equal but for tensors, and have them at the same places."""
    if isinstance(before, Tensor):
        return isinstance(after, Tensor)
    if isinstance(before, dict):
        same = isinstance(after, dict) and before.keys() == after.keys()
        return same and all(_alike(item, after[key]) for key, item in before.items())
    if isinstance(before, tuple | list):
        same = isinstance(after, tuple | list) and len(before) == len(after)
        return same and all(map(_alike, before, after))
    return before is after or before == after
