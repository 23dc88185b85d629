"""The models of `benchmarks.zoo`, and how each is built: random weights, deep networks cut short."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from meansparse_fx.zoo import load_model
from meansparse_fx.zoo import robustbench as robustbench_zoo

from .zoo_extra import EXTRA, build_extra

# One entry an architecture or forward code; RobustBench's other entries differ from one of these in size or weights.
_ROBUSTBENCH = {
    "Linf/cifar10": """Amini2024MeanSparse_Ra_WRN_70_16 Amini2024MeanSparse_S-WRN-94-16 Andriushchenko2020Understanding
        Bai2023Improving_edm Bai2024MixedNUTS Carmon2019Unlabeled Chen2020Adversarial Chen2020Efficient
        Dai2021Parameterizing Debenedetti2022Light_XCiT-S12 Ding2020MMA Engstrom2019Robustness Gowal2020Uncovering_70_16
        Hendrycks2019Using Huang2021Exploring Huang2022Revisiting_WRN-A4 Kang2021Stable Pang2020Boosting Peng2023Robust
        Rebuffi2021Fixing_R18_ddpm Rice2020Overfitting Sehwag2021Proxy_R18 Sehwag2021Proxy_ResNest152
        Wang2023Better_WRN-28-10 Wong2020Fast Wu2020Adversarial""",
    "L2/cifar10": """Amini2024MeanSparse_S-WRN-70-16 Augustin2020Adversarial Augustin2020Adversarial_34_10
        Rice2020Overfitting Rony2019Decoupling""",
    "corruptions/cifar10": """Diffenderfer2021Winning_Binary Diffenderfer2021Winning_Binary_CARD_Deck
        Diffenderfer2021Winning_LRR Diffenderfer2021Winning_LRR_CARD_Deck Hendrycks2020AugMix_ResNeXt
        Hendrycks2020AugMix_WRN Kireev2021Effectiveness_Gauss50percent Modas2021PRIMEResNet18""",
    "Linf/cifar100": """Addepalli2021Towards_PARN18 Bai2023Improving_trades Bai2024MixedNUTS Chen2020Efficient
        Hendrycks2019Using Rice2020Overfitting Wu2020Adversarial""",
    "corruptions/cifar100": """Diffenderfer2021Winning_Binary Diffenderfer2021Winning_Binary_CARD_Deck
        Diffenderfer2021Winning_LRR Diffenderfer2021Winning_LRR_CARD_Deck Hendrycks2020AugMix_ResNeXt
        Hendrycks2020AugMix_WRN Modas2021PRIMEResNet18""",
    "Linf/imagenet": """Amini2024MeanSparse_ConvNeXt-L Amini2024MeanSparse_Swin-L Bai2024MixedNUTS Chen2024Data_WRN_50_2
        Debenedetti2022Light_XCiT-S12 Liu2023Comprehensive_ConvNeXt-B Liu2023Comprehensive_Swin-B Mo2022When_ViT-B
        Peng2023Robust Salman2020Do_R18 Singh2023Revisiting_ConvNeXt-B-ConvStem
        Singh2023Revisiting_ConvNeXt-T-ConvStem Singh2023Revisiting_ViT-B-ConvStem Singh2023Revisiting_ViT-S-ConvStem
        Wong2020Fast Xu2024MIMIR_Swin-B""",
    "corruptions/imagenet": "AlexNet",
}

_TIMM = """
    bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_0_rw_224
    convit_tiny convmixer_768_32 convnext_tiny convnextv2_tiny crossvit_tiny_240 cs3darknet_s cspdarknet53 cspresnext50
    davit_tiny deit_small_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn68 eca_nfnet_l0 ecaresnet26t edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn efficientnetv2_rw_t efficientvit_b0
    efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf gcresnet33ts gcvit_xxtiny
    gernet_s ghostnet_100 ghostnetv2_100 gmlp_s16_224 hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
    inception_next_tiny inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050 legacy_seresnet50
    legacy_xception levit_128s maxvit_tiny_tf_224 mixer_b16_224 mixnet_s mobilenetv2_100 mobilenetv3_small_100
    mobilenetv4_conv_small mobileone_s0 mobilevit_s mobilevitv2_050 mvitv2_tiny nasnetalarge nest_tiny nextvit_small
    nfnet_l0 pit_xs_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnety_008 repghostnet_050
    repvgg_a2 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest50d resnet18 resnet50 resnet50_gn resnetv2_50
    resnetv2_50x1_bit resnext50_32x4d rexnet_100 sehalonet33ts selecsls42b sequencer2d_s seresnet50 skresnet18
    swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tf_efficientnet_b0 tiny_vit_5m_224
    tnt_s_patch16_224 tresnet_m twins_svt_small vgg16_bn visformer_tiny vit_base_patch16_224
    vit_base_patch16_clip_quickgelu_224 vit_base_patch16_siglip_224 vit_relpos_small_patch16_224
    vit_small_patch14_dinov2 vitamin_small_224 volo_d1_224 wide_resnet50_2 xception41 xcit_small_12_p16_224
"""

_TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_0 swin_t swin_v2_t vgg11 vgg16_bn vit_b_16 vit_b_32 wide_resnet50_2
"""

# The largest of the paper's systems once more in full, for the seconds.
_FULL = (
    "Linf/cifar10/Peng2023Robust",
    "Linf/cifar10/Wang2023Better_WRN-70-16",
    "Linf/imagenet/Liu2023Comprehensive_Swin-L",
)
FULL_SIZE = " (full size)"

MODELS = (
    *(f"robustbench:{kind}/{name}" for kind, names in _ROBUSTBENCH.items() for name in names.split()),
    *(f"torchvision:{name}" for name in _TORCHVISION.split()),
    *(f"timm:{name}" for name in _TIMM.split()),
    *(f"robustbench:{name}{FULL_SIZE}" for name in _FULL),
)

# Constructor -> its arguments, no larger than this. Widths stay in models of which other parts count on them.
_DEPTHS = {
    "wide_resnet.WideResNet": {"depth": 16},
    "boosting_wide_resnet.BoostingWideResNet": {"depth": 16},
    "dm_wide_resnet.DMWideResNet": {"depth": 16},
    "dm_rn.WideResNet": {"depth": 16},
    "paf_wide_resnet.PAF_WideResNet": {"depth": 16},
    "robust_wide_resnet.RobustWideResNet": {"depth_configs": [2, 2, 2]},
    "robust_resnet.PreActResNet": {"depth_configs": [2, 2, 2]},
    "robustarch_wide_resnet.NormalizedWideResNet": {"depth": [2, 2, 2]},
    "Meansparse_ra_wrn_70_16.NormalizedWideResNet": {"depth": [2, 2, 2]},
    "Meansparse_wrn_70_16.DMWideResNet": {"depth": 16},
    "Meansparse_wrn_94_16.MeanSparse_DMWideResNet": {"depth": 16},
    "bit_rn.ResNetV2": {"block_units": [1, 1, 1, 1]},
    "bit_rn_v2.ResNetV2": {"block_units": [1, 1, 1, 1]},
    "convnext_v2.ConvNeXtV2": {"depths": [1, 1, 1, 1]},
}
_WIDTHS = {
    "wide_resnet.WideResNet": {"widen_factor": 4},
    "boosting_wide_resnet.BoostingWideResNet": {"widen_factor": 4},
    "dm_wide_resnet.DMWideResNet": {"width": 4},
    "paf_wide_resnet.PAF_WideResNet": {"widen_factor": 4},
    "robust_wide_resnet.RobustWideResNet": {"channel_configs": [16, 64, 128, 256]},
    "robust_resnet.PreActResNet": {"channel_configs": [16, 64, 128, 256]},
    "robustarch_wide_resnet.NormalizedWideResNet": {"stage_width": [32, 64, 128]},
    "Meansparse_ra_wrn_70_16.NormalizedWideResNet": {"stage_width": [32, 64, 128]},
    "Meansparse_wrn_70_16.DMWideResNet": {"width": 4},
    "Meansparse_wrn_94_16.MeanSparse_DMWideResNet": {"width": 4},
}
_WIDTHS_MATTER = ("Kang2021", "Bai2023")

# Constructor arguments for timm: an image of 518 pixels would take longest of all.
_OPTIONS = {"vit_small_patch14_dinov2": {"img_size": 98}}


def build(name: str) -> nn.Module:
    """Return the model, in eval mode, its norms and biases away from the zeros and ones they start with."""
    torch.manual_seed(0)
    if name in EXTRA:
        model = build_extra(name)
        _perturb(model)
        return model
    source, _, rest = name.removesuffix(FULL_SIZE).partition(":")
    if source == "robustbench":
        small = contextlib.nullcontext() if name.endswith(FULL_SIZE) else _small(rest)
        with small:
            model = robustbench_zoo.architecture(rest)
    elif rest in _OPTIONS:
        model = importlib.import_module("timm").create_model(rest, **_OPTIONS[rest]).eval()
        size = _OPTIONS[rest]["img_size"]
        model.default_cfg = model.default_cfg | {"input_size": (3, size, size)}
    else:
        model = load_model(f"{source}:{rest}")
    _perturb(model)
    return model


@contextlib.contextmanager
def _small(name: str) -> Iterator[None]:
    keep_widths = any(word in name for word in _WIDTHS_MATTER)
    robustbench_zoo.entries()  # the architectures are imported
    with contextlib.ExitStack() as stack:
        for path, limits in _DEPTHS.items():
            file, _, cls = path.partition(".")
            owner = getattr(importlib.import_module(f"robustbench.model_zoo.architectures.{file}"), cls)
            limits = limits if keep_widths else limits | _WIDTHS.get(path, {})
            stack.enter_context(mock.patch.object(owner, "__init__", _limited(owner.__init__, limits)))
        yield


def _limited(init: Any, limits: dict[str, Any]) -> Any:
    signature = inspect.signature(init)

    def limited(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        for name, most in limits.items():
            value = bound.arguments[name]
            bound.arguments[name] = (
                [min(pair) for pair in zip(value, most, strict=True)] if isinstance(most, list) else min(value, most)
            )
        init(*bound.args, **bound.kwargs)

    return limited


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Move what starts at 0 or 1: a branch that is scaled by zero hides every mistake made in it."""
    for parameter in model.parameters():
        if parameter.dim() == 1 and len(parameter) > 1:
            parameter += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        held = module._buffers
        if isinstance(held.get("running_var"), torch.Tensor):
            held["running_mean"].normal_(std=0.1)
            held["running_var"].uniform_(0.5, 1.5)
            if "threshold" in held:  # a published operator; at 0 it would do nothing
                held["threshold"].fill_(0.2)
