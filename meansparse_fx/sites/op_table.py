"""Floor 2: the table of operators, one row each: its word in the plan, and more than its call tells of the channels.

Functions and tensor methods share their rows, for torch names both alike. Operators of torch that have no row are known
as well: whether they work element by element is a tag of theirs. Imports `axis` and floor 1 only.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverloadPacket
from torch.nn.modules import batchnorm, dropout, instancenorm, padding, pooling

from ..hooks import enter, leave
from . import axis
from .axis import Rule


@dataclass(frozen=True, slots=True)
class Op:
    """What the passes know of an operator.

    Attributes:
        word: How the plan calls it; empty for its own name.
        carry: Where its result has the channels.
        channels: Instead, of a layer: the dimension of its input and of its result that it has them at, from the end
            if negative.
        pools: It may pool over all of space; whether it did, the shapes tell.
        like: Its second argument gives a shape only.
        passes: It returns its input unchanged in eval mode; so does a published operator, but for its band.
        may_alias: It returns its input, a view of it or a copy, depending on the memory layout.
    """

    word: str = ""
    carry: Rule = axis.by_running
    channels: int | None = None
    pools: bool = False
    like: bool = False
    passes: bool = False
    may_alias: bool = False


BY_RUNNING = Op()
UNKNOWN = Op(carry=axis.unknown)
PUBLISHED = Op("published", axis.same, passes=True)
ELEMENTWISE = Op(carry=axis.elementwise)
_POOLS = " ".join(
    f"{kind}_pool{dims}d{ending}"
    for kind in ("avg", "max", "lp", "adaptive_avg", "adaptive_max")
    for dims in (1, 2, 3)
    for ending in ("", "_with_indices")
)
_POOL_MODULES = (
    *(pooling._AvgPoolNd, pooling._MaxPoolNd, pooling._LPPoolNd),
    *(pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd),
)
_PADS = (padding._ConstantPadNd, padding._CircularPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd)

# Names of functions in torch, torch.nn.functional and operator, and of tensor methods; the operator; types of modules.
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("conv1d conv_transpose1d", Op("conv", channels=-2), nn.Conv1d, nn.ConvTranspose1d),
    ("conv2d conv_transpose2d", Op("conv", channels=-3), nn.Conv2d, nn.ConvTranspose2d),
    ("conv3d conv_transpose3d", Op("conv", channels=-4), nn.Conv3d, nn.ConvTranspose3d),
    ("batch_norm", Op("batch_norm", channels=1), batchnorm._NormBase),
    ("instance_norm", Op("instance_norm", channels=1), instancenorm._InstanceNorm),
    ("group_norm", Op("group_norm", channels=1), nn.GroupNorm),
    ("layer_norm", Op("layer_norm", axis.normalized, -1), nn.LayerNorm),
    ("rms_norm", Op("rms_norm", axis.normalized, -1), nn.RMSNorm),
    ("linear bilinear", Op("linear", channels=-1), nn.Linear, nn.Bilinear),
    ("embedding", Op(channels=-1), nn.Embedding),
    ("pixel_shuffle pixel_unshuffle", Op("shuffle", channels=-3), nn.PixelShuffle, nn.PixelUnshuffle),
    ("channel_shuffle", Op("shuffle", channels=1), nn.ChannelShuffle),
    ("multi_head_attention_forward", Op("attention", channels=-1), nn.MultiheadAttention),
    ("", Op("rnn", channels=-1), nn.RNNBase),
    ("add add_ iadd __add__ __iadd__ __radd__", Op("add", axis.elementwise)),
    ("mul mul_ imul multiply multiply_ __mul__ __imul__ __rmul__", Op("mul", axis.elementwise)),
    ("sub sub_ isub rsub subtract __sub__ __rsub__ __isub__", Op("sub", axis.elementwise)),
    ("div div_ truediv itruediv divide true_divide __truediv__ __itruediv__", Op("div", axis.elementwise)),
    # Element by element as well, which torch does not tell of them.
    ("floordiv floor_divide __rtruediv__ greater less greater_equal less_equal int bool detach", ELEMENTWISE),
    ("zeros_like ones_like empty_like full_like requires_grad_ arctan arcsinh arctanh expit ndtr", ELEMENTWISE),
    ("logsigmoid", ELEMENTWISE, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid),
    ("softmax log_softmax softmin", Op(carry=axis.same), nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin),
    ("roll flip", Op(carry=axis.same)),  # roll takes 0.8 ms on the meta device
    ("contiguous to type type_as float half bfloat16 double cpu cuda", Op(carry=axis.same, may_alias=True)),
    (
        "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth",
        Op("dropout", axis.same, passes=True),
        dropout._DropoutNd,
    ),
    ("", Op("identity", axis.same, passes=True), nn.Identity),
    ("permute transpose transpose_ t swapaxes swapdims movedim moveaxis", Op("permute")),
    (
        "view reshape flatten ravel unflatten squeeze unsqueeze squeeze_ unsqueeze_",
        Op("reshape", axis.regrouped, may_alias=True),
        *(nn.Flatten, nn.Unflatten),
    ),
    ("reshape_as view_as", Op("reshape", axis.regrouped, like=True, may_alias=True)),
    ("expand_as", Op("expand", like=True)),
    ("split chunk tensor_split split_with_sizes unsafe_split unsafe_chunk unbind select getitem", Op("slice")),
    ("__getitem__", Op("slice")),
    ("cat concat concatenate", Op("cat", axis.joined)),
    ("pad", Op(carry=axis.same), *_PADS),
    ("interpolate upsample", Op(carry=axis.same), nn.Upsample),
    (_POOLS, Op("pool", axis.same, pools=True), *_POOL_MODULES),
    ("mean sum amax amin max min norm var std logsumexp nanmean median", Op(pools=True)),
    ("matmul bmm mm baddbmm addmm __matmul__", Op("matmul", pools=True)),
    ("scaled_dot_product_attention", Op("attention")),
    ("apply", Op("function", axis.unchanged)),
)
_NAMESPACES = (F, torch, torch._C._nn, torch.special, operator)
METHODS: dict[str, Op] = {name: op for names, op, *_ in _ROWS for name in names.split()}
FUNCTIONS: dict[Any, Op] = {
    function: op
    for name, op in METHODS.items()
    for function in (getattr(namespace, name, None) for namespace in _NAMESPACES)
    if function is not None
} | {
    getattr: BY_RUNNING,
    enter: Op("hooks", axis.joined, may_alias=True),
    leave: Op("hooks", axis.unchanged, like=True, may_alias=True),
}

# Functions that libraries keep from being traced, by qualified name.
LIBRARY_FUNCTIONS = {
    "torchvision.ops.stochastic_depth.stochastic_depth": METHODS["dropout"],
    "torchvision.models.swin_transformer.shifted_window_attention": Op("attention", channels=-1),
}

# The nearest row in a module's list of base classes counts.
MODULES: dict[type[nn.Module], Op] = {kind: op for _, op, *kinds in _ROWS for kind in kinds}


@functools.cache
def unlisted(target: Callable | str) -> Op:
    """Return what is known of a function, or of a tensor's method, that has no row."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not isinstance(target, str) and all(getattr(space, name, None) is not target for space in _NAMESPACES):
        return UNKNOWN
    forms = (name.strip("_"), name.strip("_") + "_", f"special_{name}", f"_{name}")
    packets = (getattr(torch.ops.aten, form, None) for form in forms)
    found = next((p for p in packets if isinstance(p, OpOverloadPacket)), None)
    tags = {tag for overload in (found.overloads() if found else ()) for tag in getattr(found, overload).tags}
    return ELEMENTWISE if torch.Tag.pointwise in tags else BY_RUNNING
