"""Floor 5: from a short text to a model: ``timm:NAME``, ``torchvision:NAME``, ``file.py:function``, ``bundled``.

Nothing is downloaded: weights come from a file or stay as the model's builder set them. timm and torchvision
are imported only when asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import bundled
from .bundled.network import FashionResNet
from .errors import ArtifactError, ModelError

SPECS = "timm:NAME, torchvision:NAME, path/to/file.py:function, or bundled"

# Mean and deviation per colour that most ImageNet weights were trained with.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Normalised(nn.Module):
    """A model for images in [0, 1], around one that expects them normalised; ``model`` is the prefix of its names.

    Args:
        model: Takes ``(images - mean) / std``.
        mean, std: One value a colour.
    """

    def __init__(self, model: nn.Module, mean: Iterable[float], std: Iterable[float]):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def load_model(spec: str, weights: str | Path | None = None, num_classes: int | None = None) -> nn.Module:
    """Return the model that ``spec`` names, in eval mode.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``path/to/file.py:function`` (called without arguments), or
            ``bundled``.
        weights: safetensors, or a state_dict that ``torch.load(weights_only=True)`` reads: bare or under the
            key ``state_dict``, with or without DataParallel's ``module.`` prefix.
        num_classes: Length of the logits, for timm and torchvision.

    Raises:
        ModelError: No such model, or the weights do not fit it.
        ArtifactError: The weights' file cannot be read.

    Example:
        >>> load_model("bundled").head
        Linear(in_features=64, out_features=10, bias=True)
    """
    source, _, name = spec.rpartition(":")
    if num_classes is not None and source not in ("timm", "torchvision"):
        raise ModelError(f"{spec}: a number of classes can be chosen for timm and torchvision models only")
    if spec == "bundled":
        model: nn.Module = bundled.load_model()
    elif source == "timm":
        model = _from_timm(name, num_classes)
    elif source == "torchvision":
        model = _from_torchvision(name, num_classes)
    elif source.endswith(".py"):
        model = _from_file(Path(source), name)
    else:
        raise ModelError(f"{spec!r} names no model; expected {SPECS}")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of one image ``(C, H, W)`` for ``model``: what it says itself, or ImageNet's."""
    if isinstance(model, FashionResNet):
        return (1, 28, 28)
    return tuple(getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)))  # timm's convention


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights kept in a file into ``model``; every one of its tensors, and no others.

    Raises:
        ArtifactError: The file cannot be read.
        ModelError: Names or shapes differ; the model is unchanged.
    """
    state, own = read_state_dict(path), model.state_dict()
    problems = [
        f"{len(names)} {what}: {_some(names)}"
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
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"{path}: truncated, or neither safetensors nor a plain state_dict ({first}); files that need "
            "unpickling are not read: save model.state_dict()"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtifactError(f"{path}: not a state_dict, bare or under the key 'state_dict'")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _from_timm(name: str, num_classes: int | None) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise ModelError(_unknown("timm", name, timm.list_models()))
    options = {} if num_classes is None else {"num_classes": num_classes}
    return timm.create_model(name, pretrained=False, **options)


def _from_torchvision(name: str, num_classes: int | None) -> nn.Module:
    models = _library("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(_unknown("torchvision", name, known))
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # what they do anyway, without their warning about it
    return models.get_model(name, weights=None, **options)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ModelError(f"{package} is not installed: pip install 'meansparse_fx[zoo]'") from error


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"meansparse_fx_user_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None  # a .py file has one
    module = importlib.util.module_from_spec(module_spec)
    # As for `python file.py`: the file may import its neighbours, now and when the model runs.
    if (directory := str(path.resolve().parent)) not in sys.path:
        sys.path.append(directory)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        functions = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module_spec.name]
        raise ModelError(f"{path} has no function {function!r}; it has {_some(functions) or 'none'}")
    model = build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path}:{function} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _unknown(library: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; close: {', '.join(close)}" if close else f"; {library}'s own list_models() has the names"
    return f"{library} has no model {name!r}{hint}"


def _some(names: Iterable[str], limit: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")
