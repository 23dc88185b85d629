"""Floor 1: the form of the operator in published MeanSparse checkpoints, and how their names map to ours.

Facts from RobustBench 1.1.1 (architecture files ``Meansparse_*.py`` and ``sparsified_model.py``): an operator is a
module without children that holds ``running_mean`` and ``running_var`` ``[C]`` and ``threshold``, a scalar which is
alpha. It replaces where ``|x - mean| < alpha * sqrt(variance)``, strictly. Imports errors only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .errors import StatisticsError

_KEYS = ("running_mean", "running_var", "threshold")
# Of the authors' own calibration; nothing that a calibrated operator reads.
_LEFTOVERS = ("flag_update_statistics", "batch_num", "momentum", "epsilon")

# Path of a published operator -> name of the site it stands at in the base model. The first that fits counts.
_RULES: tuple[tuple[re.Pattern, str], ...] = tuple(
    (re.compile(rf"(^|(?<=\.)){pattern}$"), site)
    for pattern, site in (
        (r"meansparse_([01])", r"relu_\2"),  # WideResNets: before the block's activations
        (r"meansparse_2", "residual_sum"),
        (r"meansparse_end", "relu"),
        (r"mlp\.meansparse1", "mlp.act"),  # Swin: behind fc1 and behind fc2, the block's second branch
        (r"mlp\.meansparse2", "residual_branch_1"),
        (r"meansparse1", "residual_sum"),
        (r"meansparse2", "residual_sum_1"),
        (r"act\.0", "act"),  # ConvNeXt: the activation and the branch's end became sequences of two
        (r"drop_path\.1", "residual_branch"),
    )
)


@dataclass(frozen=True, slots=True, eq=False)
class PublishedOperator:
    """What a published operator holds; alpha is half the width of its band in standard deviations."""

    mean: Tensor  # [C]
    variance: Tensor  # [C]
    alpha: float
    calibrating: bool = False  # it was left in the middle of that


def published_operator(module: nn.Module) -> PublishedOperator | None:
    """Return what ``module`` holds if it is a published operator, else None."""
    held = {key: buffer for key, buffer in module._buffers.items() if buffer is not None}
    if module._modules or not held.keys() >= set(_KEYS):
        return None
    mean, variance, alpha = (held[key] for key in _KEYS)
    if mean.dim() != 1 or variance.shape != mean.shape or alpha.numel() != 1:
        return None
    flag = held.get("flag_update_statistics")
    return PublishedOperator(mean, variance, alpha.item(), flag is not None and bool(flag))


def split_checkpoint(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, PublishedOperator]]:
    """Return the base model's part of a published checkpoint, and its operators by our site names."""
    paths = [key.removesuffix(".threshold") for key in state_dict if key.endswith(".threshold")]
    paths = [path for path in paths if f"{path}.running_var" in state_dict]
    if not paths:
        raise StatisticsError("no published MeanSparse operators in this checkpoint (no key ends with .threshold)")
    found, own = {}, set()
    for path in paths:
        mean, variance, alpha = (state_dict[f"{path}.{key}"] for key in _KEYS)
        found[site_name(path)] = PublishedOperator(mean, variance, alpha.item())
        own |= {f"{path}.{key}" for key in (*_KEYS, *_LEFTOVERS)}
    return {key: value for key, value in state_dict.items() if key not in own}, found


def site_name(path: str) -> str:
    """Return the name of the site at which the published operator ``path`` stands.

    Example:
        >>> site_name("layer.0.block.3.meansparse_1"), site_name("stages.0.blocks.1.mlp.act.0")
        ('layer.0.block.3.relu_1', 'stages.0.blocks.1.mlp.act')
    """
    for pattern, site in _RULES:
        if pattern.search(path):
            return pattern.sub(site, path)
    raise StatisticsError(f"{path}: no published architecture has an operator of this name; transform its own model")
