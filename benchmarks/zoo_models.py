"""The models of `benchmarks.zoo`, listed in zoo_models.json, and how each is built: random weights, cut short.

RobustBench has one entry an architecture or forward code: its others differ from one of these in size or weights. The
file's ``depths`` and ``widths`` are the largest arguments that its constructors get, ``extra`` what the models of other
libraries are made from.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from meansparse_fx.zoo import load_model
from meansparse_fx.zoo import robustbench as robustbench_zoo

_LISTED = json.loads(Path(__file__).with_suffix(".json").read_text())
MODELS, EXTRA = tuple(_LISTED["models"]), tuple(_LISTED["extra"])
FULL_SIZE = " (full size)"  # once more in full, for the seconds
_WIDTHS_MATTER = ("Kang2021", "Bai2023")  # other parts of them count on it
# Constructor arguments for timm: an image of 518 pixels would take longest of all.
_OPTIONS = {"vit_small_patch14_dinov2": {"img_size": 98}}


def library(name: str) -> list[str]:
    """Return the library of a model of `EXTRA` with its version; nothing of other models."""
    package = name.partition(":")[0].partition(".")[0]
    return [f"{package} {importlib.import_module(package).__version__}"] if name in EXTRA else []


def build(name: str) -> nn.Module:
    """Return the model, in eval mode, its norms and biases away from the zeros and ones they start with."""
    torch.manual_seed(0)
    source, _, rest = name.removesuffix(FULL_SIZE).partition(":")
    if name in EXTRA:
        model = _extra(source, rest, _LISTED["extra"][name])
    elif source == "robustbench":
        with contextlib.nullcontext() if name.endswith(FULL_SIZE) else _small(rest):
            model = robustbench_zoo.architecture(rest)
    elif rest in _OPTIONS:
        model = importlib.import_module("timm").create_model(rest, **_OPTIONS[rest]).eval()
        size = _OPTIONS[rest]["img_size"]
        model.default_cfg = model.default_cfg | {"input_size": (3, size, size)}
    else:
        model = load_model(f"{source}:{rest}")
    perturb(model)
    return model


def _extra(source: str, name: str, given: dict[str, Any]) -> nn.Module:
    """Return a model of another library, which says what images it takes as timm's do."""
    library = importlib.import_module(source)
    size = given.get("image_size", 64)
    if source == "transformers":
        config = re.sub(r"(For[A-Z]\w+|Model)$", "Config", name)
        model = getattr(library, name)(getattr(library, config)(**given))
    elif source == "open_clip":
        text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
        model = library.CLIP(embed_dim=32, vision_cfg=given, text_cfg=text).visual
    elif source == "segmentation_models_pytorch":
        model = getattr(library, name)("resnet18", encoder_weights=None, classes=4)
    else:
        model = getattr(library, name)(weights=None, weights_backbone=None, num_classes=5)
    model.default_cfg = {"input_size": (3, size, size)}
    return model.eval()


@contextlib.contextmanager
def _small(name: str) -> Iterator[None]:
    keep_widths = any(word in name for word in _WIDTHS_MATTER)
    robustbench_zoo.entries()  # the architectures are imported
    with contextlib.ExitStack() as stack:
        for path, limits in _LISTED["depths"].items():
            file, _, cls = path.partition(".")
            owner = getattr(importlib.import_module(f"robustbench.model_zoo.architectures.{file}"), cls)
            limits = limits if keep_widths else limits | _LISTED["widths"].get(path, {})
            stack.enter_context(mock.patch.object(owner, "__init__", _limited(owner.__init__, limits)))
        yield


def _limited(init: Any, limits: dict[str, Any]) -> Any:
    signature = inspect.signature(init)

    def limited(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        for name, most in limits.items():
            value = bound.arguments[name]
            many = isinstance(most, list)
            bound.arguments[name] = [*map(min, value, most)] if many else min(value, most)
        init(*bound.args, **bound.kwargs)

    return limited


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move what starts at 0 or 1, or next to it: a branch that is scaled by zero hides every mistake made in it."""
    for parameter in model.parameters():
        if 1 < parameter.numel() == max(parameter.shape):
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        held = module._buffers
        if isinstance(held.get("running_var"), torch.Tensor):
            held["running_mean"].normal_(std=0.1)
            held["running_var"].uniform_(0.5, 1.5)
            if "threshold" in held:  # a published operator; at 0 it would do nothing
                held["threshold"].fill_(0.2)
