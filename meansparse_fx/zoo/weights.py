"""Floor 1: weights from files: safetensors, or what `torch.load` reads without unpickling. Imports errors only."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import ArtifactError, ModelError


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights kept in a file into ``model``; every one of its tensors, and no others.

    Raises:
        ArtifactError: The file cannot be read.
        ModelError: Names or shapes differ; the model is unchanged.
    """
    state, own = read_state_dict(path), model.state_dict()
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (
            ("missing", own.keys() - state.keys()),
            ("unexpected", state.keys() - own.keys()),
            (
                "of another shape",
                {
                    f"{n} {list(state[n].shape)} for {list(own[n].shape)}"
                    for n in own.keys() & state.keys()
                    if state[n].shape != own[n].shape
                },
            ),
        )
        if names
    ]
    if problems:
        raise ModelError(f"{path}: weights of another model; {'; '.join(problems)}")
    model.load_state_dict(state)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a saved state_dict, by name, without ``module.`` prefix."""
    state = read_checkpoint(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not is_state_dict(state):
        raise ArtifactError(f"{path}: not a state_dict, bare or under the key 'state_dict'")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def read_checkpoint(path: str | Path) -> Any:
    """Return what a file holds, on the CPU: a dictionary of tensors, or what was saved around it."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"{path}: truncated, or neither safetensors nor a plain state_dict ({first}); files that need "
            "unpickling are not read: save model.state_dict()"
        ) from error


def is_state_dict(value: Any) -> bool:
    """Return whether ``value`` is a dictionary of tensors, with at least one."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of the names, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")
