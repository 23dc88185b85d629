"""The models that benchmarks measure, with random weights: time does not depend on them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from .wide_resnet import WideResNet


class Unavailable(Exception):
    """The package that a model comes from is not installed here."""


def _torchvision(name: str) -> nn.Module:
    return getattr(_package("torchvision.models"), name)()


def _timm(name: str) -> nn.Module:
    return _package("timm").create_model(name)


def _robustbench(name: str) -> nn.Module:
    _package("robustbench", load=False)
    return importlib.import_module(".zoo_models", __package__).build(f"robustbench:{name}")


def _package(name: str, load: bool = True) -> object:
    root = name.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise Unavailable(f"{root} is not installed")
    return importlib.import_module(name) if load else None


# Name -> how to build it, and the side of its images. The small RaWRN is RaWRN-70-16, its depth 2, 2, 2, its stages 32,
# 64 and 128 channels wide.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "WRN-16-4": (lambda: WideResNet(16, 4), 32),
    "WRN-28-10": (lambda: WideResNet(28, 10), 32),
    "WRN-70-16": (lambda: WideResNet(70, 16), 32),
    "RaWRN-small": (lambda: _robustbench("Linf/cifar10/Peng2023Robust"), 32),
    "ResNet-50": (lambda: _torchvision("resnet50"), 224),
    "ConvNeXt-T": (lambda: _torchvision("convnext_tiny"), 224),
    "Swin-T": (lambda: _torchvision("swin_t"), 224),
    "Swin-L": (lambda: _timm("swin_large_patch4_window7_224"), 224),
}


def build(name: str) -> nn.Module:
    """Return a model of `MODELS`, in eval mode.

    Raises:
        Unavailable: Its package is not installed.
    """
    model = MODELS[name][0]().eval()
    _stir(model)
    return model


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Move what starts at 0 or 1, or next to it: a mistake made with it would not be seen in the logits."""
    for path, parameter in model.named_parameters():
        if "layer_scale" in path:  # ConvNeXt's, which starts with 1e-6
            parameter.fill_(0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
