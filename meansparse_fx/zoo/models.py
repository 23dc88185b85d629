"""Floor 5: from a short text to a model: ``timm:NAME``, ``torchvision:NAME``, ``robustbench:THREAT/DATA/NAME``,
``file.py:function``, ``bundled``.

Weights come from a file, or stay as the model's builder set them; only RobustBench's, which are the point of it, are
downloaded. The libraries are imported only when asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import bundled
from ..arguments import some
from ..errors import ModelError
from ..names import SPECS
from . import robustbench
from .weights import load_weights


class Normalised(nn.Module):
    """A model for images in [0, 1] around ``model``, which takes ``(images - mean) / std``: one value a colour."""

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
        spec: ``timm:NAME``, ``torchvision:NAME``, ``robustbench:THREAT/DATASET/NAME`` as on RobustBench's pages,
            ``path/to/file.py:function`` (called without arguments), or ``bundled``.
        weights: safetensors, or a state_dict that ``torch.load(weights_only=True)`` reads: bare or in a
            checkpoint, with or without the prefixes that wrappers put before the names. For RobustBench its own files,
            or the directory of an ensemble's; None takes what lies where RobustBench keeps it, or downloads it there.
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
    if source == "robustbench":
        return robustbench.load(name, weights)
    if spec == "bundled":
        model: nn.Module = bundled.load_model()
    elif source in ("timm", "torchvision"):
        model = _from_library(source, name, {} if num_classes is None else {"num_classes": num_classes})
    elif source.endswith(".py"):
        model = _from_file(Path(source), name)
    else:
        raise ModelError(f"{spec!r} names no model; expected {SPECS}")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of one image ``(C, H, W)`` for ``model``: what it says itself, or ImageNet's."""
    return tuple(getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)))  # timm's convention


def _from_library(library: str, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        package = importlib.import_module({"timm": "timm", "torchvision": "torchvision.models"}[library])
    except ImportError as error:
        raise ModelError(f"{library} is not installed: pip install 'meansparse_fx[zoo]'") from error
    known = package.list_models(**{} if library == "timm" else {"module": package})  # classifiers alone
    if not (name in known or (library == "timm" and package.is_model(name))):
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; close: {', '.join(close)}" if close else f"; {library}'s own list_models() has the names"
        raise ModelError(f"{library} has no model {name!r}{hint}")
    if library == "timm":
        return package.create_model(name, pretrained=False, **options)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # what they do anyway, without their warning about it
    return package.get_model(name, weights=None, **options)


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    module_spec: Any = importlib.util.spec_from_file_location(f"meansparse_fx_user_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    # As for `python file.py`: the file may import its neighbours, now and when the model runs.
    if (directory := str(path.resolve().parent)) not in sys.path:
        sys.path.append(directory)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    build = getattr(module, function, None)
    if not callable(build):
        functions = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module_spec.name]
        raise ModelError(f"{path} has no function {function!r}; it has {some(functions) or 'none'}")
    model = build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path}:{function} returned {type(model).__name__}, not a torch.nn.Module")
    return model
