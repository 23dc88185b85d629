"""Floor 5: weights from files: safetensors, or what `torch.load` reads without unpickling. Imports floor 1 only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..arguments import some
from ..errors import ArtifactError, ModelError, first_line

# Modules that wrap a model or a part of it put their names into those of the tensors.
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_DEPTH = 4  # of dictionaries in a checkpoint


def load_weights(model: nn.Module, path: str | Path, held: Any = None) -> None:
    """Load the weights kept in a file into ``model``; every one of its tensors.

    A file may hold several state_dicts, each under a key or under a prefix of its names (``state_dict``, ``ema``,
    ``model.``, ``module.``); the one that has the model's names and shapes, and no others, is taken.

    Args:
        held: What the file holds, if it was read before.

    Raises:
        ArtifactError: The file cannot be read, or holds no state_dict.
        ModelError: None of them is the model's, or several that differ are; the model is unchanged.
    """
    held = read_checkpoint(path) if held is None else held
    found, own = dict(_state_dicts(held, "", _DEPTH)), model.state_dict()
    if not found:
        keys = f"; it holds {_listed(held)}" if isinstance(held, Mapping) and held else ""
        raise ArtifactError(f"{path}: not a state_dict, bare or under a key{keys}")
    forms = {f"{key}{form}": state for key, value in found.items() for form, state in _forms(value, own).items()}
    fitting = {key: s for key, s in forms.items() if len(s) == len(own) and not _problems(own, s)}
    if not fitting:
        nearest = min(forms.values(), key=lambda state: len(own.keys() ^ state.keys()))
        several = f" (it holds {_listed(found)})" if len(found) > 1 else ""
        raise ModelError(f"{path}: weights of another model{several}; {'; '.join(_problems(own, nearest))}")
    first, *others = fitting.values()
    same = ((value, other[name]) for other in others for name, value in first.items())
    if not all(one is two or (one.dtype == two.dtype and torch.equal(one, two)) for one, two in same):
        raise ModelError(
            f"{path}: {len(fitting)} different weights of the model, under {_listed(fitting)}: save those you mean "
            "in a file of their own"
        )
    model.load_state_dict(first)


def _state_dicts(value: Any, key: str, depth: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield the state_dicts in what was saved; an optimizer's state is none."""
    if not isinstance(value, Mapping) or not depth or any(not isinstance(name, str) for name in value):
        return
    if value and all(isinstance(tensor, Tensor) for tensor in value.values()):
        yield key, value
        return
    for name in (name for name in value if not name.startswith("optim")):
        yield from _state_dicts(value[name], f"{key}.{name}" if key else name, depth - 1)


def _forms(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Return a state_dict as it is, without the names of wrappers, and each part of it that may be the model's own."""
    bare = {".".join(p for p in name.split(".") if p not in _WRAPPERS): value for name, value in state.items()}
    found: dict[str, Mapping[str, Tensor]] = {"": state}
    if len(bare) == len(state) and bare.keys() != state.keys():
        found[" without wrappers"] = bare
    ends = [*own][:1] + [*own][-1:]  # the first would do, but another model's file may lack it and is to be explained
    for names in list(found.values()):
        for prefix in {name.removesuffix(end) for end in ends for name in names if name.endswith(f".{end}")}:
            part = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
            found.setdefault(f" {prefix}", part)
    return found


def _problems(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return in what names and shapes differ, in words."""
    shapes = {
        f"{n} {list(state[n].shape)} for {list(own[n].shape)}"
        for n in own.keys() & state.keys()
        if state[n].shape != own[n].shape
    }
    kinds = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(), "of another shape": shapes}
    return [f"{len(names)} {what}: {some(names)}" for what, names in kinds.items() if names]


def _listed(held: Mapping[Any, Any]) -> str:
    return some((repr(str(key).strip()) for key in held), limit=10)


def read_checkpoint(path: str | Path) -> Any:
    """Return what a file holds, on the CPU: a dictionary of tensors, or what was saved around it."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ArtifactError(
            f"{path}: truncated, or neither safetensors nor a plain state_dict ({first_line(error)}); files that need "
            "unpickling are not read: save model.state_dict()"
        ) from error
