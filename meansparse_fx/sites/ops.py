"""Floor 2: what is known of each operator, one row each: its word in the plan, how it carries the channels.

Functions and tensor methods share their rows, for torch names both alike. Another operator is one more name here.
Imports `axis` and floor 1 only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, dropout, instancenorm, padding

from ..activations import ActivationCall, match_function, match_module
from ..published import PublishedOperator, published_operator
from . import axis
from .axis import Rule

if TYPE_CHECKING:
    from .composites import Composite


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
_ELEMENTWISE = Op(carry=axis.elementwise)
_REDUCTION = Op(carry=axis.reduced, pools=True)
_RESHAPE = Op("reshape", axis.regrouped, may_alias=True)

# Rows of names: functions in torch, torch.nn.functional and operator, and tensor methods.
_ROWS: tuple[tuple[str, Op], ...] = (
    ("conv1d conv_transpose1d", Op("conv", axis.before_spatial(1), wants=-2)),
    ("conv2d conv_transpose2d", Op("conv", axis.before_spatial(2), wants=-3)),
    ("conv3d conv_transpose3d", Op("conv", axis.before_spatial(3), wants=-4)),
    ("batch_norm", Op("batch_norm", axis.second, wants=1)),
    ("instance_norm", Op("instance_norm", axis.second, wants=1)),
    ("group_norm", Op("group_norm", axis.second, wants=1)),
    ("layer_norm", Op("layer_norm", axis.layer_norm, wants=-1)),
    ("rms_norm", Op("rms_norm", axis.layer_norm, wants=-1)),
    ("linear bilinear", Op("linear", axis.last, wants=-1)),
    ("embedding", Op(carry=axis.last)),
    ("add add_ iadd __add__ __iadd__ __radd__", Op("add", axis.elementwise)),
    ("mul mul_ imul multiply multiply_ __mul__ __imul__ __rmul__", Op("mul", axis.elementwise)),
    ("sub sub_ isub rsub subtract __sub__ __rsub__ __isub__", Op("sub", axis.elementwise)),
    ("div div_ truediv itruediv divide true_divide __truediv__ __itruediv__", Op("div", axis.elementwise)),
    ("addcmul addcmul_ addcdiv lerp where masked_fill masked_fill_ maximum minimum pow pow_ floordiv", _ELEMENTWISE),
    ("neg abs exp expm1 log log1p sqrt rsqrt reciprocal square sin cos erf sign round floor ceil", _ELEMENTWISE),
    ("sigmoid sigmoid_ tanh tanh_ hardsigmoid hardtanh hardtanh_ logsigmoid softsign tanhshrink", _ELEMENTWISE),
    ("selu selu_ celu celu_ rrelu threshold softshrink hardshrink clamp clamp_ clamp_min clamp_max clip", _ELEMENTWISE),
    ("nan_to_num detach requires_grad_ zeros_like ones_like empty_like full_like", _ELEMENTWISE),
    ("gt lt ge le eq ne greater less greater_equal less_equal logical_and logical_or logical_not", _ELEMENTWISE),
    ("__gt__ __lt__ __ge__ __le__ __eq__ __ne__ __neg__ __pow__ __rpow__ __abs__ __rtruediv__", _ELEMENTWISE),
    ("sinh cosh atan erfc logaddexp heaviside square_ exp_ log_ sqrt_ reciprocal_ abs_ neg_", _ELEMENTWISE),
    ("clamp_min_ clamp_max_ clip_", _ELEMENTWISE),
    ("softmax log_softmax softmin gumbel_softmax normalize cumsum local_response_norm", Op(carry=axis.same)),
    ("roll flip sort", Op(carry=axis.same)),
    ("clone", Op(carry=axis.same)),
    ("contiguous to type type_as float half bfloat16 double cpu cuda", Op(carry=axis.same, may_alias=True)),
    (
        "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth",
        Op("dropout", axis.same, passes=True, may_alias=True),
    ),
    ("permute", Op("permute", axis.permuted)),
    ("transpose transpose_ swapaxes swapdims", Op("permute", axis.transposed)),
    ("movedim moveaxis", Op("permute", axis.moved)),
    ("view reshape flatten ravel unflatten squeeze unsqueeze squeeze_ unsqueeze_", _RESHAPE),
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
    ("pad interpolate upsample", Op(carry=axis.resized)),
    ("pixel_shuffle pixel_unshuffle", Op("shuffle", axis.before_spatial(2))),
    ("channel_shuffle", Op("shuffle", axis.second)),
    ("avg_pool1d max_pool1d max_pool1d_with_indices lp_pool1d", Op("pool", axis.trailing(1), pools=True)),
    ("avg_pool2d max_pool2d max_pool2d_with_indices lp_pool2d", Op("pool", axis.trailing(2), pools=True)),
    ("avg_pool3d max_pool3d max_pool3d_with_indices", Op("pool", axis.trailing(3), pools=True)),
    ("adaptive_avg_pool1d adaptive_max_pool1d", Op("pool", axis.trailing(1), pools=True)),
    ("adaptive_avg_pool2d adaptive_max_pool2d", Op("pool", axis.trailing(2), pools=True)),
    ("adaptive_avg_pool3d adaptive_max_pool3d", Op("pool", axis.trailing(3), pools=True)),
    ("mean sum amax amin max min norm var std logsumexp nanmean median", _REDUCTION),
    ("matmul bmm mm baddbmm addmm __matmul__", Op("matmul", axis.product, pools=True)),
    ("scaled_dot_product_attention", Op("attention", axis.attended)),
    ("multi_head_attention_forward", Op("attention", axis.last)),
)
_METHODS = {name: op for names, op in _ROWS for name in names.split()}
_FUNCTIONS: dict[Any, Op] = {
    function: op
    for name, op in _METHODS.items()
    for function in (getattr(namespace, name, None) for namespace in (F, torch, operator))
    if function is not None
} | {getattr: Op(carry=axis.attribute, may_alias=True)}

# Functions that libraries keep from being traced, by qualified name.
_LIBRARY_FUNCTIONS = {
    "torchvision.ops.stochastic_depth.stochastic_depth": _METHODS["dropout"],
    "torchvision.models.swin_transformer.shifted_window_attention": Op("attention", axis.last),
}

# The nearest row in a module's list of base classes counts.
_MODULES: dict[type[nn.Module], Op] = {
    **{t: _METHODS["conv1d"] for t in (nn.Conv1d, nn.ConvTranspose1d)},
    **{t: _METHODS["conv2d"] for t in (nn.Conv2d, nn.ConvTranspose2d)},
    **{t: _METHODS["conv3d"] for t in (nn.Conv3d, nn.ConvTranspose3d)},
    batchnorm._NormBase: _METHODS["batch_norm"],
    instancenorm._InstanceNorm: _METHODS["instance_norm"],
    nn.GroupNorm: _METHODS["group_norm"],
    nn.LayerNorm: _METHODS["layer_norm"],
    nn.RMSNorm: _METHODS["rms_norm"],
    nn.Linear: _METHODS["linear"],
    nn.Bilinear: _METHODS["linear"],
    nn.Embedding: _METHODS["embedding"],
    nn.Identity: Op("identity", axis.same, passes=True, may_alias=True),
    dropout._DropoutNd: _METHODS["dropout"],
    **{t: _METHODS["avg_pool1d"] for t in (nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)},
    **{t: _METHODS["avg_pool2d"] for t in (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)},
    **{t: _METHODS["avg_pool3d"] for t in (nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)},
    nn.LPPool2d: _METHODS["lp_pool2d"],
    nn.Upsample: _METHODS["interpolate"],
    **{
        t: _METHODS["pad"]
        for t in (padding._ConstantPadNd, padding._ReflectionPadNd, padding._ReplicationPadNd, padding._CircularPadNd)
    },
    nn.PixelShuffle: _METHODS["pixel_shuffle"],
    nn.PixelUnshuffle: _METHODS["pixel_shuffle"],
    nn.ChannelShuffle: _METHODS["channel_shuffle"],
    nn.Flatten: _RESHAPE,
    nn.Unflatten: _RESHAPE,
    nn.LocalResponseNorm: _METHODS["normalize"],
    nn.MultiheadAttention: _METHODS["multi_head_attention_forward"],
    nn.RNNBase: Op("rnn", axis.last),
    **{t: _METHODS["softmax"] for t in (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)},
    **{t: _ELEMENTWISE for t in (nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardsigmoid, nn.Hardtanh)},
    **{t: _ELEMENTWISE for t in (nn.SELU, nn.CELU, nn.RReLU, nn.Threshold, nn.Softsign, nn.Softshrink, nn.Hardshrink)},
}


@dataclass(frozen=True, slots=True)
class Operators:
    """Looks up what the nodes of one graph are.

    Attributes:
        modules: The graph's modules by every path they have.
        paths: The first path of each module, by its id: the one that names sites.
        callers: Path of the module whose forward makes a call, by node, where the nodes do not tell themselves.
        known: The activation of calls that do not tell themselves; None for calls inside of one.
        tensors: What parameters and buffers hold, by the placeholder that stands for one.
        composites: By call, the activation written out of several calls, or by one that is several things, which it
            is a part of.
        weights: Why a call makes a weight and no feature, by the activation call that is part of it.
    """

    modules: dict[str, nn.Module]
    paths: dict[int, str]
    callers: dict[fx.Node, str] = field(default_factory=dict)
    known: dict[fx.Node, ActivationCall | None] = field(default_factory=dict)
    tensors: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    composites: Mapping[fx.Node, Composite] = field(default_factory=dict)
    weights: Mapping[fx.Node, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> Operators:
        """Return the look-up for ``graph_module``."""
        modules = dict(graph_module.named_modules(remove_duplicate=False))
        paths = {id(m): path for path, m in graph_module.named_modules()}
        for module in modules.values():
            # A published checkpoint made its place a sequence of two: what was there before goes by the old name.
            if type(module) is nn.Sequential and len(module) == 2:
                added = [child for child in module if published_operator(child) is not None]
                paths |= {id(child): paths[id(module)] for child in module if len(added) == 1 and child is not added[0]}
        return cls(modules, paths)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module a node calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def op(self, node: fx.Node) -> Op:
        """Return what is known of a node."""
        if node in self.composites:
            return _ELEMENTWISE
        if self.activation(node) is not None:
            return _ACTIVATION
        if node.op == "call_method":
            return _METHODS.get(str(node.target), UNKNOWN)
        if node.op == "call_function":
            inside = _ELEMENTWISE if node in self.known else UNKNOWN  # of an activation; its own code, such as Swish's
            return _FUNCTIONS.get(node.target) or _LIBRARY_FUNCTIONS.get(_qualified(node), inside)
        module = self.module(node)
        row = next((_MODULES[base] for base in type(module).__mro__ if base in _MODULES), None)
        return row or (UNKNOWN if self.published(node) is None else _PUBLISHED)

    def published(self, node: fx.Node) -> PublishedOperator | None:
        """Return the published operator a node calls, if it calls one."""
        module = self.module(node)
        return None if module is None else published_operator(module)

    def moves_only(self, node: fx.Node) -> bool:
        """Return whether a node changes no values, only where they are, and leaves each channel whole."""
        op = self.op(node)
        return op.word in ("reshape", "permute") or (op.passes and op is not _PUBLISHED)

    def activation(self, node: fx.Node) -> ActivationCall | None:
        """Return the activation a node calls, or the last call of which it is, if there is one."""
        if node in self.composites:
            return self.composites[node].call if node is self.composites[node].node else None
        if node in self.known:
            return self.known[node]
        module = self.module(node)
        if module is not None:
            return match_module(module)
        if node.op not in ("call_function", "call_method"):
            return None
        try:
            return match_function(node.target, node.args, node.kwargs)
        except TypeError:
            # A constant that the graph computes: the bare operator goes before the call, which keeps its arguments.
            call = match_function(node.target, (), {})
            inplace = any(a is True for a in (*node.args, node.kwargs.get("inplace")))
            return call and replace(call, constants=(), inplace=call.inplace or inplace, fused=False)

    def source(self, node: fx.Node) -> Any:
        """Return the tensor that an activation's node reads, or what it is the last call of."""
        if node in self.composites:
            return self.composites[node].source
        return node.args[0] if node.args else node.kwargs["input"]

    def readers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the calls of an activation that read its source: several where it is a composite."""
        composite = self.composites.get(node)
        return (node,) if composite is None else composite.readers

    def refusal(self, node: fx.Node) -> str | None:
        """Return why no operator can stand before an activation, by what it is."""
        composite = self.composites.get(node)
        return self.weights.get(node) if composite is None else composite.skipped

    def reader(self, node: fx.Node) -> fx.Node | None:
        """Return the only call that reads a node, those of one composite taken for one; None if there are several."""
        parts = [(user, self.composites.get(user)) for user in node.users]
        readers = {c.node if c is not None and c.source is node else user for user, c in parts}
        return readers.pop() if len(readers) == 1 else None

    def tensor(self, node: fx.Node) -> Tensor | None:
        """Return the parameter or the buffer that a node reads."""
        if node.op != "get_attr":
            return self.tensors.get(node)
        path, _, name = str(node.target).rpartition(".")
        owner = self.modules.get(path) or node.graph.owning_module
        tensor = getattr(owner, name, None)
        return tensor if isinstance(tensor, Tensor) else None

    def word(self, node: fx.Node) -> str:
        """Return what the plan calls a node."""
        activation = self.activation(node)
        if activation is not None:
            return activation.name
        if node.op == "placeholder":
            return "input"
        module = self.module(node)
        own = type(module).__name__.lower() if module is not None else _name(node)
        return self.op(node).word or own

    def enclosing(self, node: fx.Node) -> str:
        """Return the path of the module whose forward makes this call; a module's own path if it is one."""
        module = self.module(node)
        if module is not None:
            return self.paths[id(module)]
        if node in self.callers:
            return self.callers[node]
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        return self.paths.get(id(self.modules.get(path)), path)

    def label(self, node: fx.Node) -> str:
        """Return a name for a node that its author recognises: `layer1.0.conv1`, `layer1.0.add`."""
        if (composite := self.composites.get(node)) is not None and composite.node is node:
            return composite.path
        path = self.enclosing(node)
        # Where modules are traced into, the call inside an activation module goes by the module's name.
        if node.op == "call_module" or (path in self.modules and match_module(self.modules[path]) is not None):
            return path
        return f"{path}.{self.word(node)}" if path else self.word(node)


_ACTIVATION = Op(carry=axis.same)
_PUBLISHED = Op("published", axis.same, passes=True)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _qualified(node: fx.Node) -> str:
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', '')}"
