"""Models of other libraries for `benchmarks.zoo --extra`: random weights from small configurations, as they are."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_VIT |= {"image_size": 32, "patch_size": 8}
_SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
_SWIN |= {"window_size": 4}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
_MOBILE = {"depth_multiplier": 0.25, "image_size": 64}
_LEVIT: dict[str, Any] = {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 2, 2]}
_LEVIT |= {"depths": [1, 1, 1], "key_dim": [8, 8, 8]}

# Class of the model -> class of its configuration, and what that is given.
_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "ViT": _VIT,
    "DeiT": _VIT,
    "Beit": _VIT | {"use_relative_position_bias": True},
    "Swin": _SWIN,
    "Swinv2": _SWIN,
    "ConvNext": _STAGES,
    "ConvNextV2": _STAGES,
    "ResNet": _STAGES | {"embedding_size": 8},
    "RegNet": _STAGES | {"embedding_size": 8, "groups_width": 8},
    "MobileNetV1": _MOBILE,
    "MobileNetV2": _MOBILE,
    "EfficientNet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "PoolFormer": _STAGES,
    "Cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "Levit": _LEVIT,
    "Dinov2": _VIT,
    "Segformer": _STAGES | {"decoder_hidden_size": 32},
    "MobileViT": {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
}
_TRANSFORMERS = {f"{name}ForImageClassification": (f"{name}Config", given) for name, given in _CLASSIFIERS.items()}
_TRANSFORMERS |= {
    "SegformerForSemanticSegmentation": ("SegformerConfig", _CLASSIFIERS["Segformer"] | {"num_labels": 5}),
    "CLIPVisionModel": ("CLIPVisionConfig", _VIT),
}
_SMP = ("Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "PSPNet")
_TORCHVISION = ("deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
_OPEN_CLIP: dict[str, dict[str, Any]] = {
    "ViT": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
    "ViT with tokens": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "output_tokens": True},
    "ModifiedResNet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
}

EXTRA = (
    *(f"transformers:{name}" for name in _TRANSFORMERS),
    *(f"segmentation_models_pytorch:{name}" for name in _SMP),
    *(f"torchvision.models.segmentation:{name}" for name in _TORCHVISION),
    *(f"open_clip:{name}" for name in _OPEN_CLIP),
)


def library(name: str) -> list[str]:
    """Return the library of a model of `EXTRA` with its version; nothing of other models."""
    package = name.partition(":")[0].partition(".")[0]
    return [f"{package} {importlib.import_module(package).__version__}"] if name in EXTRA else []


def build_extra(name: str) -> nn.Module:
    """Return a model of `EXTRA`, which says what images it takes as timm's do."""
    source, _, rest = name.partition(":")
    library = importlib.import_module(source)
    size = 64
    if source == "transformers":
        config, given = _TRANSFORMERS[rest]
        model = getattr(library, rest)(getattr(library, config)(**given))
        size = given.get("image_size", size)
    elif source == "open_clip":
        text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
        model = library.CLIP(embed_dim=32, vision_cfg=_OPEN_CLIP[rest], text_cfg=text).visual
        size = _OPEN_CLIP[rest]["image_size"]
    elif source == "segmentation_models_pytorch":
        model = getattr(library, rest)("resnet18", encoder_weights=None, classes=4)
    else:
        model = getattr(library, rest)(weights=None, weights_backbone=None, num_classes=5)
    model.default_cfg = {"input_size": (3, size, size)}
    return model.eval()
