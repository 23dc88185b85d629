"""Floor 2: the table of operators, one row each: its word in the plan, how it carries the channels.

Functions and tensor methods share their rows, for torch names both alike. Another operator is one more name here.
Imports `axis` and floor 1 only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import batchnorm, dropout, instancenorm, padding

from ..hooks import enter, leave
from . import axis
from .axis import Rule


@dataclass(frozen=True, slots=True)
class Op:
    """What the passes know of an operator.

    Attributes:
        word: How the plan calls it; empty for its own name.
        carry: Where its result has the channels.
        pools: It may pool over all of space; whether it did, the shapes tell.
        like: Its second argument gives a shape only.
        passes: It returns its input unchanged in eval mode; so does a published operator, but for its band.
        may_alias: It returns its input, a view of it or a copy, depending on the memory layout.
        wants: The dimension of its input, from the end if negative, where it expects the channels.
    """

    word: str = ""
    carry: Rule = axis.unknown
    pools: bool = False
    like: bool = False
    passes: bool = False
    may_alias: bool = False
    wants: int | None = None


UNKNOWN = Op()
ACTIVATION = Op(carry=axis.same)
PUBLISHED = Op("published", axis.same, passes=True)
ELEMENTWISE = Op(carry=axis.elementwise)
_REDUCTION = Op(carry=axis.reduced, pools=True)
_RESHAPE = Op("reshape", axis.regrouped, may_alias=True)


def _pool(dims: int) -> Op:
    return Op("pool", axis.trailing(dims), pools=True)


# Names of functions in torch, torch.nn.functional and operator, and of tensor methods; the operator; types of modules.
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("conv1d conv_transpose1d", Op("conv", axis.before_spatial(1), wants=-2), nn.Conv1d, nn.ConvTranspose1d),
    ("conv2d conv_transpose2d", Op("conv", axis.before_spatial(2), wants=-3), nn.Conv2d, nn.ConvTranspose2d),
    ("conv3d conv_transpose3d", Op("conv", axis.before_spatial(3), wants=-4), nn.Conv3d, nn.ConvTranspose3d),
    ("batch_norm", Op("batch_norm", axis.second, wants=1), batchnorm._NormBase),
    ("instance_norm", Op("instance_norm", axis.second, wants=1), instancenorm._InstanceNorm),
    ("group_norm", Op("group_norm", axis.second, wants=1), nn.GroupNorm),
    ("layer_norm", Op("layer_norm", axis.layer_norm, wants=-1), nn.LayerNorm),
    ("rms_norm", Op("rms_norm", axis.layer_norm, wants=-1), nn.RMSNorm),
    ("linear bilinear", Op("linear", axis.last, wants=-1), nn.Linear, nn.Bilinear),
    ("embedding", Op(carry=axis.last), nn.Embedding),
    ("add add_ iadd __add__ __iadd__ __radd__", Op("add", axis.elementwise)),
    ("mul mul_ imul multiply multiply_ __mul__ __imul__ __rmul__", Op("mul", axis.elementwise)),
    ("sub sub_ isub rsub subtract __sub__ __rsub__ __isub__", Op("sub", axis.elementwise)),
    ("div div_ truediv itruediv divide true_divide __truediv__ __itruediv__", Op("div", axis.elementwise)),
    ("addcmul addcmul_ addcdiv lerp where masked_fill masked_fill_ maximum minimum pow pow_ floordiv", ELEMENTWISE),
    ("neg abs exp expm1 log log1p sqrt rsqrt reciprocal square sin cos erf sign round floor ceil", ELEMENTWISE),
    ("sigmoid sigmoid_ tanh tanh_ hardsigmoid hardtanh hardtanh_ logsigmoid softsign tanhshrink", ELEMENTWISE),
    ("selu selu_ celu celu_ rrelu threshold softshrink hardshrink clamp clamp_ clamp_min clamp_max clip", ELEMENTWISE),
    ("nan_to_num detach requires_grad_ zeros_like ones_like empty_like full_like", ELEMENTWISE),
    ("gt lt ge le eq ne greater less greater_equal less_equal logical_and logical_or logical_not", ELEMENTWISE),
    ("__gt__ __lt__ __ge__ __le__ __eq__ __ne__ __neg__ __pow__ __rpow__ __abs__ __rtruediv__", ELEMENTWISE),
    ("sinh cosh atan erfc logaddexp heaviside square_ exp_ log_ sqrt_ reciprocal_ abs_ neg_", ELEMENTWISE),
    ("clamp_min_ clamp_max_ clip_ tan asin acos asinh acosh atanh arctan arcsinh arctanh exp2 sinc", ELEMENTWISE),
    ("fmax fmin float_power hypot sgn logit erfinv xlogy copysign expit ndtr log_ndtr log2 int bool", ELEMENTWISE),
    ("softmax log_softmax softmin", Op(carry=axis.same), nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin),
    ("gumbel_softmax normalize cumsum local_response_norm", Op(carry=axis.same), nn.LocalResponseNorm),
    ("roll flip sort", Op(carry=axis.same)),
    ("clone", Op(carry=axis.same)),
    ("contiguous to type type_as float half bfloat16 double cpu cuda", Op(carry=axis.same, may_alias=True)),
    (
        "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth",
        Op("dropout", axis.same, passes=True),
        dropout._DropoutNd,
    ),
    ("permute", Op("permute", axis.permuted)),
    ("transpose transpose_ swapaxes swapdims", Op("permute", axis.transposed)),
    ("movedim moveaxis", Op("permute", axis.moved)),
    ("view reshape flatten ravel unflatten squeeze unsqueeze squeeze_ unsqueeze_", _RESHAPE, nn.Flatten, nn.Unflatten),
    ("reshape_as view_as", Op("reshape", axis.regrouped, like=True, may_alias=True)),
    ("expand repeat tile", Op(carry=axis.stretched)),
    ("expand_as", Op("expand", axis.stretched, like=True)),
    ("repeat_interleave index_select narrow", Op(carry=axis.resized)),
    ("cat concat concatenate", Op("cat", axis.joined)),
    ("stack", Op("stack", axis.stacked)),
    ("split chunk tensor_split split_with_sizes unsafe_split unsafe_chunk", Op("slice", axis.same)),
    ("unbind", Op("slice", axis.dropped(0))),
    ("select", Op("slice", axis.dropped())),
    ("getitem __getitem__", Op("slice", axis.indexed)),
    ("pad", Op(carry=axis.resized), padding._ConstantPadNd, padding._CircularPadNd),
    ("", Op(carry=axis.resized), padding._ReflectionPadNd, padding._ReplicationPadNd),
    ("interpolate upsample", Op(carry=axis.resized), nn.Upsample),
    ("pixel_shuffle pixel_unshuffle", Op("shuffle", axis.before_spatial(2)), nn.PixelShuffle, nn.PixelUnshuffle),
    ("channel_shuffle", Op("shuffle", axis.second), nn.ChannelShuffle),
    ("avg_pool1d max_pool1d max_pool1d_with_indices lp_pool1d", _pool(1), nn.AvgPool1d, nn.MaxPool1d),
    ("avg_pool2d max_pool2d max_pool2d_with_indices lp_pool2d", _pool(2), nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d),
    ("avg_pool3d max_pool3d max_pool3d_with_indices", _pool(3), nn.AvgPool3d, nn.MaxPool3d),
    ("adaptive_avg_pool1d adaptive_max_pool1d", _pool(1), nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    ("adaptive_avg_pool2d adaptive_max_pool2d", _pool(2), nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    ("adaptive_avg_pool3d adaptive_max_pool3d", _pool(3), nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
    ("mean sum amax amin max min norm var std logsumexp nanmean median", _REDUCTION),
    ("matmul bmm mm baddbmm addmm __matmul__", Op("matmul", axis.product, pools=True)),
    ("scaled_dot_product_attention", Op("attention", axis.attended)),
    ("multi_head_attention_forward", Op("attention", axis.last), nn.MultiheadAttention),
    ("apply", Op("function", axis.applied)),
    ("", ELEMENTWISE, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Softsign),
    ("", ELEMENTWISE, nn.SELU, nn.CELU, nn.RReLU, nn.Threshold, nn.Softshrink, nn.Hardshrink),
    ("", Op("identity", axis.same, passes=True), nn.Identity),
    ("", Op("rnn", axis.last), nn.RNNBase),
)
METHODS: dict[str, Op] = {name: op for names, op, *_ in _ROWS for name in names.split()}
FUNCTIONS: dict[Any, Op] = {
    function: op
    for name, op in METHODS.items()
    for function in (getattr(namespace, name, None) for namespace in (F, torch, torch._C._nn, torch.special, operator))
    if function is not None
} | {
    getattr: Op(carry=axis.attribute),
    enter: Op("hooks", axis.joined, may_alias=True),
    leave: Op("hooks", axis.left, like=True, may_alias=True),
}

# Functions that libraries keep from being traced, by qualified name.
LIBRARY_FUNCTIONS = {
    "torchvision.ops.stochastic_depth.stochastic_depth": METHODS["dropout"],
    "torchvision.models.swin_transformer.shifted_window_attention": Op("attention", axis.last),
}

# The nearest row in a module's list of base classes counts.
MODULES: dict[type[nn.Module], Op] = {kind: op for _, op, *kinds in _ROWS for kind in kinds}
