"""What benchmarks measure: models with random weights (time does not depend on them), and the operator as others
write it, to stand beside ours.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import meansparse_fx as msfx
from meansparse_fx.activations import ActivationCall
from meansparse_fx.cost.forms import branch_free, published
from meansparse_fx.kernels.reference import ACTIVATIONS, parameters
from meansparse_fx.nn import MeanSparse
from meansparse_fx.zoo import load_model

from . import zoo
from .harness import Row


class Block(nn.Module):
    """Norm, ReLU and convolution, twice, beside a shortcut; where the width changes, both start from the activation."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(width_in), nn.ReLU()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(self.relu2(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-widen, pre-activation, as in Zagoruyko and Komodakis (2016): three groups of (depth - 4) / 6 blocks."""

    def __init__(self, depth: int, widen: int, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks, width = [], 16
        for group in range(3):
            for first in [True] + [False] * ((depth - 4) // 6 - 1):
                blocks.append(Block(width, 16 * widen * 2**group, 2 if first and group else 1))
                width = 16 * widen * 2**group
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, classes]`` of images ``[N, 3, H, W]``."""
        x = self.relu(self.bn(self.blocks(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


# Name -> how to build it, and the side of its images. WRN-10-1 is for rehearsals. The small RaWRN is RaWRN-70-16, its
# depth 2, 2, 2, its stages 32, 64 and 128 channels wide.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "WRN-10-1": (lambda: WideResNet(10, 1), 32),
    "WRN-16-4": (lambda: WideResNet(16, 4), 32),
    "WRN-28-10": (lambda: WideResNet(28, 10), 32),
    "WRN-70-16": (lambda: WideResNet(70, 16), 32),
    "RaWRN-small": (partial(zoo.build, "robustbench:Linf/cifar10/Peng2023Robust"), 32),
    "ResNet-50": (partial(load_model, "torchvision:resnet50"), 224),
    "ConvNeXt-T": (partial(load_model, "torchvision:convnext_tiny"), 224),
    "Swin-T": (partial(load_model, "torchvision:swin_t"), 224),
    "Swin-L": (partial(load_model, "timm:swin_large_patch4_window7_224"), 224),
}


def build(name: str) -> nn.Module:
    """Return a model of `MODELS` in eval mode, its norms and biases moved.

    Raises:
        ModelError: Its package is not installed.
    """
    model = MODELS[name][0]().eval()
    zoo.perturb(model)
    return model


class Form(nn.Module):
    """The operator as others write it, then an activation, in place where the model has it in place.

    Args:
        name: ``published``, as checkpoints have it: a Python branch on a tensor, std from the variance each time; or
            ``branch-free``, its band computed once: what a careful reader of the paper would write.
        centre, std: ``[C]``.
    """

    def __init__(
        self, name: str, centre: Tensor, std: Tensor, alpha: float, channel_dim: int = 1,
        activation: ActivationCall | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        # Published: `<`. The next float, of the type they compute in, makes that the others' closed interval.
        above = torch.nextafter(std.new_tensor(alpha), std.new_tensor(1.0)) if name == "published" else None
        self.channel_dim = channel_dim
        self.register_buffer("centre", centre.clone())
        self.register_buffer("width", alpha * std if above is None else std.square())
        self.register_buffer("alpha", above)
        row = ACTIVATIONS[activation.name if activation else "identity"]
        self.act = row.overwrite if activation and activation.inplace and row.overwrite else row.forward
        self.constants = activation.constants if activation else ()

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        if self.alpha is None:
            x = branch_free(x, self.centre, self.width, self.channel_dim)
        else:
            x = published(x, self.centre, self.width, self.alpha, self.channel_dim)
        return self.act(x, *parameters(weight, self.constants))


def with_form(sparse: fx.GraphModule, form: str) -> nn.Module:
    """Return a copy of a transformed model that has a `Form`, in the model's dtype, at each site."""
    rival = copy.deepcopy(sparse)
    dtype = next((p.dtype for p in sparse.parameters() if p.is_floating_point()), None)
    for path, own in list(rival.named_modules()):
        if isinstance(own, MeanSparse):
            inner = Form(form, own.mean, own.std, float(own.alpha), own.channel_dim, own.activation)
            rival.set_submodule(path, inner.to(dtype=dtype))
    return rival


def counts(name: str) -> list[Row]:
    """Return what each form of the operator must move in a model, by `meansparse_fx.cost`, a form a row.

    That depends on shapes alone, so it is the same on every machine.
    """
    torch.manual_seed(0)
    found = msfx.cost(build(name), torch.rand(2, 3, MODELS[name][1], MODELS[name][1]))
    return [
        Row(
            benchmark="roofline", case=name, contender=form, site_count=len(found),
            forward_calls=total.forward.calls, forward_bytes=total.forward.bytes // found.images,
            backward_calls=total.backward.calls, backward_bytes=total.backward.bytes // found.images,
        )
        for form, total in found.total.items()
    ]  # fmt: skip
