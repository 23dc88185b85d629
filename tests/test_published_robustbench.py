"""RobustBench's own MeanSparse architectures against `transform` of the plain ones, operator for operator."""

from __future__ import annotations

import copy
import importlib
from collections import Counter

import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.zoo.robustbench_compat import library

timm = pytest.importorskip("timm")

RAWRN = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "groups": [1, 1, 1],
    "activation_fn": nn.SiLU,
    "se_ratio": 0.25,
    "se_activation": nn.ReLU,
    "se_order": 2,
}


def architectures(name: str):
    library()
    return importlib.import_module(f"robustbench.model_zoo.architectures.{name}")


def wrn(file: str, cls: str, depth: int):
    def build():
        options = {"num_classes": 10, "depth": depth, "width": 1, "activation_fn": nn.SiLU}
        plain = architectures("dm_wide_resnet").DMWideResNet(**options)
        return plain, getattr(architectures(file), cls)(**options)

    return build


def rawrn(depth: list[int]):
    def build():
        options = RAWRN | {"stem_width": 8, "depth": depth, "stage_width": [12, 16, 24]}
        plain = architectures("robustarch_wide_resnet").NormalizedWideResNet(**options)
        return plain, architectures("Meansparse_ra_wrn_70_16").NormalizedWideResNet(**options)

    return build


def swin(depths: tuple[int, ...], heads: tuple[int, ...]):
    def build():
        size = 16 * 2 ** (len(depths) - 1)
        options = {"img_size": size, "embed_dim": 8, "depths": depths, "num_heads": heads, "window_size": 2}
        plain = timm.models.swin_transformer.SwinTransformer(num_classes=5, **options)
        return plain, architectures("Meansparse_swin_L").SwinTransformer(num_classes=5, **options)

    return build


def convnext(depths: tuple[int, ...]):
    def build():
        plain = timm.models.convnext.ConvNeXt(depths=depths, dims=(8, 16, 32, 64), num_classes=5)
        published = copy.deepcopy(plain)
        module = architectures("sparsified_model")
        widths = {192: 8, 384: 16, 768: 32, 1536: 64}  # the published code knows those of ConvNeXt-L only
        module.add_custom_layer_imagenet(published, lambda c: module.MeanSparse_imagenet(widths.get(c, c)))
        return plain, published

    return build


# Builder, placement, image size, operators. Totals of the full depths: RobustBench's checkpoints (ConvNeXt-L 72,
# Swin-L 96, RaWRN-70-16 214, WRN-70-16 100, WRN-94-16 136).
SMALL = {
    "wrn-70": (wrn("Meansparse_wrn_70_16", "DMWideResNet", 10), "robustbench:wrn", 32, 10),
    "wrn-94": (wrn("Meansparse_wrn_94_16", "MeanSparse_DMWideResNet", 16), "robustbench:wrn", 32, 19),
    "rawrn": (rawrn([2, 1, 1]), "robustbench:rawrn", 32, 13),
    "swin": (swin((2, 2), (2, 4)), "robustbench:swin", 32, 16),
    "convnext": (convnext((1, 2, 1, 1)), "robustbench:convnext", 32, 10),
}
FULL = {
    "WRN-70-16": (wrn("Meansparse_wrn_70_16", "DMWideResNet", 70), "robustbench:wrn", 32, 100),
    "WRN-94-16": (wrn("Meansparse_wrn_94_16", "MeanSparse_DMWideResNet", 94), "robustbench:wrn", 32, 136),
    "RaWRN-70-16": (rawrn([30, 31, 10]), "robustbench:rawrn", 32, 214),
    "Swin-L": (swin((2, 2, 18, 2), (2, 2, 4, 4)), "robustbench:swin", 128, 96),
    "ConvNeXt-L": (convnext((3, 3, 27, 3)), "robustbench:convnext", 32, 72),
}


def populated(model: nn.Module) -> nn.Module:
    """Return the model with random norms and operators, in float64 and eval mode."""
    g = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=g))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.5)
        elif name.endswith(".threshold"):
            buffer.fill_(0.3)
    return model.double().eval()


@pytest.mark.parametrize(
    "case", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FULL)], ids=lambda name: name
)
def test_equals_the_published_architecture(case):
    build, placement, size, operators = (SMALL | FULL)[case]
    torch.manual_seed(0)
    plain, published = build()
    published = populated(published)
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    placed = msfx.transform(plain.double().eval(), images, placement=placement)
    msfx.load_published(placed, published.state_dict())
    taken = msfx.transform(published, images)
    assert len(msfx.operators(placed)) == operators
    assert list(msfx.operators(placed)) == list(msfx.operators(taken))
    with torch.no_grad():
        expected, base = published(images), msfx.restore(placed)(images)
        for model in (placed, taken):
            torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    assert not torch.allclose(base, expected)
    assert placed.state_dict().keys() == taken.state_dict().keys()


@pytest.mark.slow
def test_the_imagenet_rawrn_leaves_out_the_blocks_last_activation():
    model = architectures("robustarch_wide_resnet").get_model("ra_wrn101_2")
    plan = msfx.inspect(model.eval(), torch.rand(2, 3, 64, 64), "robustbench:rawrn-imagenet")
    left = Counter(s.refusal.kind for s in plan if s.refusal)
    blocks = 37
    assert left == {"gate": blocks, "placement": blocks}
    assert all(s.producer == "add" for s in plan if s.refusal and s.refusal.kind == "placement")
