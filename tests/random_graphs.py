"""Random networks with every hazard that capture and rewriting meet, each of which knows its own sites.

A network is a stem, blocks and a head. Every activation's input passes through `site`, a plain Python function that
returns it: a capture sees nothing of it. Within `recording` it notes the channel dimension and whether a gate holds the
activation, and with statistics it applies the operator's definition (paper, section 3.2) in plain torch. So a network
is its own reference, which shares no code with the package.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Record:
    """What one pass saw.

    Attributes:
        bands: Centre and threshold ``[C]`` of the sites that are rewritten, in order; none are applied if empty.
        sites: Channel dimension, channels and whether it is a gate's, of each activation in order.
    """

    bands: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sites: list[tuple[int, int, bool]] = field(default_factory=list)


_RECORD: Record | None = None


@contextmanager
def recording(bands: list[tuple[Tensor, Tensor]] | None = None) -> Iterator[Record]:
    """Let every activation note itself, behind the operator with these centres and thresholds."""
    global _RECORD
    _RECORD = Record(list(bands or []))
    try:
        yield _RECORD
    finally:
        _RECORD = None


def site(x: Tensor, dim: int, gate: bool = False) -> Tensor:
    """Return what the activation of a site is applied to: x, or s(x) while a reference is computed."""
    if _RECORD is None:
        return x
    _RECORD.sites.append((dim, x.shape[dim], gate))
    active = sum(not g for *_, g in _RECORD.sites) - 1
    if gate or not _RECORD.bands:
        return x
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    centre, threshold = (v.view(shape).to(x.dtype) for v in _RECORD.bands[active])
    return torch.where((x - centre).abs() <= threshold, centre, x)


# Activations. Modules: how to make one. Functions: of a tensor. The last do their work in the tensor they are given.
MODULES: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Softplus),
    *(nn.Hardtanh, nn.CELU, nn.SELU, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
    lambda: nn.GELU("tanh"),
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.ELU(0.5),
    lambda: nn.Softplus(2.0, 5.0),
    lambda: nn.Hardtanh(0.0, 6.0),
    lambda: nn.Threshold(0.0, 0.0),
    lambda: nn.Threshold(0.1, 0.2),
)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.mish, F.softplus),
    *(F.celu, torch.celu, F.selu, torch.selu, torch.tanh, F.softsign, F.tanhshrink, F.hardtanh),
    *(F.softshrink, F.hardshrink),
    # torch's methods, which no function names.
    lambda x: x.relu(),
    lambda x: x.tanh(),
    lambda x: x.hardshrink(),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.leaky_relu(x, negative_slope=0.3),
    lambda x: F.elu(x, 0.7),
    lambda x: F.softplus(x, beta=3),
    lambda x: F.threshold(x, 0, 0),
    # Written out.
    lambda x: x.clamp(min=0),
    lambda x: torch.clamp(x, 0, 6),
    lambda x: x * torch.sigmoid(x),
    lambda x: x.sigmoid() * x,
    lambda x: x * torch.tanh(F.softplus(x)),
    lambda x: x * F.relu6(x + 3) / 6,
    lambda x: x * torch.sigmoid(1.702 * x),
    lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: torch.maximum(x, 0.1 * x),
)
IN_PLACE: tuple[Callable[[], Callable[[Tensor], Tensor]], ...] = (
    *(lambda cls=cls: cls(inplace=True) for cls in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardswish)),
    *(lambda cls=cls: cls(inplace=True) for cls in (nn.Mish, nn.CELU, nn.SELU, nn.Hardtanh)),
    *(lambda f=f: f for f in (F.relu_, torch.relu_, F.leaky_relu_, F.elu_, torch.tanh_)),
    lambda: lambda x: x.relu_(),
    lambda: lambda x: x.tanh_(),
    lambda: lambda x: F.relu(x, inplace=True),
    lambda: lambda x: F.silu(x, inplace=True),
)


class Act(nn.Module):
    """An activation in some spelling; ``inplace`` says that it overwrites its input."""

    def __init__(self, g: Generator, dim: int, inplace: bool | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.inplace = g.chance(0.25) if inplace is None else inplace
        if self.inplace:
            self.act = g.pick(IN_PLACE)()
        elif g.chance(0.5):
            self.act = g.pick(MODULES)()
        elif dim == 1 and g.chance(0.1):
            self.act = nn.PReLU(g.width)
        else:
            self.act = g.pick(FUNCTIONS)
        if isinstance(self.act, nn.Module) and g.chance(0.1):
            self.act.register_forward_hook(g.pick(HOOKS))

    def forward(self, x: Tensor) -> Tensor:
        if not self.inplace or _RECORD is None:
            return self.act(site(x, self.dim))
        s = site(x, self.dim).clone()
        y = self.act(s)  # overwrites s; a hook's result is another tensor
        overwritten = x.copy_(s)
        return overwritten if y is s else y


def _scaled(module, args, output):
    return output * 0.9


def _seen(module, args, output):
    return None


def _shifted(module, args):
    return (args[0] + 0.1,)


HOOKS = (_scaled, _seen)


class Doubled(torch.autograd.Function):
    """x + 0.1, whose backward is not its derivative; the activation inside is its own business."""

    @staticmethod
    def forward(ctx, x):
        return F.relu(x) - F.relu(-x) + 0.1

    @staticmethod
    def backward(ctx, g):
        return 2 * g


# Blocks: [N, C, H, W] to the same shape. `g` is the generator, C its width.


class ConvAct(nn.Sequential):
    def __init__(self, g: Generator) -> None:
        parts: list[nn.Module] = [g.conv()]
        if g.chance(0.7):
            parts.append(g.norm())
        parts.append(Act(g, 1))
        super().__init__(*parts)


class PreAct(nn.Module):
    """Norm, activation, convolution; in place only behind the norm, whose result is its own."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.norm, self.act, self.conv = g.norm(), Act(g, 1), g.conv()

    def forward(self, x):
        return self.conv(self.act(self.norm(x)))


class Residual(nn.Module):
    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.body = nn.ModuleList(g.block(g.pick((ConvAct, PreAct, Mixer, Gate, Split))) for _ in range(g.pick((1, 2))))
        self.end = g.conv()
        self.norm = g.norm() if g.chance(0.5) else nn.Identity()
        self.gamma = nn.Parameter(torch.rand(g.width, 1, 1)) if g.chance(0.3) else None
        self.way = g.pick(("+", "reversed", "add", "+=", "alpha"))
        self.act = Act(g, 1) if g.chance(0.6) else None

    def forward(self, x):
        y = x.clone() if any(getattr(m, "inplace", False) for m in self.body.modules()) else x
        for part in self.body:
            y = part(y)
        y = self.norm(self.end(y))
        if self.gamma is not None:
            y = y * self.gamma
        if self.way == "+":
            y = x + y
        elif self.way == "reversed":
            y = y + x
        elif self.way == "+=":
            y += x
        else:
            y = torch.add(x, y, alpha=0.5) if self.way == "alpha" else torch.add(y, x)
        return y if self.act is None else self.act(y)


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Conv2d(g.width, 2, 1), g.pick(MODULES)(), nn.Conv2d(2, g.width, 1)
        self.pool = g.pick(POOLS)
        self.weigh = g.pick((torch.sigmoid, lambda x: x.sigmoid(), F.hardsigmoid))
        self.swap = g.chance(0.5)

    def forward(self, x):
        w = self.weigh(self.up(self.act(site(self.down(self.pool(x)), 1, gate=True))))
        return w * x if self.swap else x * w


POOLS = (
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: x.amax((2, 3), keepdim=True),
    lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True),
    lambda x: F.avg_pool2d(x, x.shape[-1]),
)


HEAD_POOLS = (
    lambda x: x.mean((2, 3)),
    lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda x: x.flatten(2).amax(-1),
)


class Split(nn.Module):
    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.conv = g.conv()
        self.way = g.pick(("chunk", "split", "slice", "tensor_split", "unbind"))
        self.first, self.second = Act(g, 1, inplace=False), Act(g, 1, inplace=False) if g.chance(0.5) else None
        for act in (self.first, self.second):
            if act is not None and isinstance(act.act, nn.PReLU):
                act.act = nn.PReLU()

    def forward(self, x):
        x = self.conv(x)
        if self.way == "unbind":
            a, b = torch.stack([x, -x], 1).unbind(1)
        elif self.way == "slice":
            a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        elif self.way == "split":
            a, b = x.split([x.shape[1] // 2, x.shape[1] // 2], dim=1)
        else:
            a, b = getattr(torch, self.way)(x, 2, dim=1)
        a = self.first(a)
        b = b if self.second is None else self.second(b)
        return a - b if self.way == "unbind" else torch.cat([b, a], 1)


class Mixer(nn.Module):
    """Channels last by permutation, a perceptron of them, and back."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(g.width, 6), nn.Linear(6, g.width)
        self.norm = nn.LayerNorm(g.width) if g.chance(0.6) else nn.Identity()
        self.way = g.pick(("permute", "movedim", "windows", "tokens", "transpose"))
        self.act = Act(g, 2 if self.way == "tokens" else 4 if self.way == "windows" else 3)

    def forward(self, x):
        n, c, h, w = x.shape
        if self.way == "permute":
            return self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.way == "movedim":
            return self.mlp(x.movedim(1, -1)).movedim(-1, 1).contiguous()
        if self.way == "transpose":
            return self.mlp(x.transpose(1, 3)).transpose(1, 3)
        if self.way == "tokens":
            return self.mlp(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)
        y = x.permute(0, 2, 3, 1).view(n, h // 2, 2, w, c).transpose(2, 3)
        return self.mlp(y).transpose(2, 3).reshape(n, h, w, c).permute(0, 3, 1, 2)

    def mlp(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Attention(nn.Module):
    """Tokens with a class token: attention, then a perceptron, each with its residual."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        c = g.width
        self.token = nn.Parameter(torch.randn(1, 1, c))
        self.norm1, self.norm2, self.qkv, self.out = (
            nn.LayerNorm(c),
            nn.LayerNorm(c),
            nn.Linear(c, 3 * c),
            nn.Linear(c, c),
        )
        self.up, self.act, self.down = nn.Linear(c, 6), Act(g, 2), nn.Linear(6, c)
        self.by_hand = g.chance(0.5)

    def forward(self, x):
        n, c, h, w = x.shape
        x = torch.cat([self.token.expand(n, -1, -1), x.flatten(2).mT], 1)
        q, k, v = self.qkv(self.norm1(x)).reshape(n, -1, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.by_hand:
            y = ((q * (c // 2) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, -1, c))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return x[:, 1:].transpose(1, 2).reshape(n, c, h, w)


class Shared(nn.Module):
    """One activation, called twice; one convolution, too."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.conv, self.norm, self.act = g.conv(), g.norm(), Act(g, 1)

    def forward(self, x):
        return self.act(self.norm(self.conv(self.act(self.conv(x)))))


class Viewed(nn.Module):
    """An activation on another view of a map."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.conv, self.act = g.conv(), Act(g, 1)
        self.way = g.pick(("flatten", "view", "reshape", "unsqueeze", "rows", "padded", "rolled"))

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        if self.way == "flatten":
            return self.act(x.flatten(2)).view(n, c, h, w)
        if self.way == "view":
            return self.act(x.contiguous().view(n, c, h * w)).unflatten(2, (h, w))
        if self.way == "reshape":
            return self.act(x.reshape(n, c, -1)).reshape(x.shape)
        if self.way == "unsqueeze":
            return self.act(x.unsqueeze(-1)).squeeze(-1)
        if self.way == "rows" and not self.act.inplace:
            return torch.cat([self.act(r) for r in (x[:, :, :3], x[:, :, 3:])], 2)
        if self.way == "padded":
            return self.act(F.pad(x, (1, 1, 1, 1)))[:, :, 1:-1, 1:-1]
        return self.act(torch.roll(x, (1, 1), (2, 3)))


class ReadAgain(nn.Module):
    """An activation in place, whose input is read again under its own name."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.conv, self.act = g.conv(), Act(g, 1, inplace=g.chance(0.8))

    def forward(self, x):
        y = self.conv(x)
        z = self.act(y)
        return y + 0.5 * z


class Derived(nn.Module):
    """A model's own derivatives: autograd.Function, tensor hooks, grad modes, checkpoints."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.inner = g.block(g.pick((ConvAct, PreAct, Split, Mixer)))
        self.conv, self.act = g.conv(), Act(g, 1, inplace=False)
        self.way = g.pick(("function", "hook", "no_grad", "set_grad", "detach", "checkpoint", "buffer"))
        self.register_buffer("scale", torch.rand(g.width, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        if self.way == "checkpoint":
            x = self.act(x)  # recomputed, a site would be noted twice
            return checkpoint(self.inner, x, use_reentrant=False) if _RECORD is None else self.inner(x)
        if self.way == "function":
            x = Doubled.apply(x)
        elif self.way == "hook":
            x.register_hook(lambda gradient: gradient * 0.5)
        elif self.way == "no_grad":
            with torch.no_grad():
                y = self.act(x) * 0.1
            return self.inner(x + y)
        elif self.way == "set_grad":
            with torch.set_grad_enabled(False):
                y = x.mean((2, 3), keepdim=True)
            x = x - y
        elif self.way == "detach":
            return self.inner(self.act(x) - x.detach() * 0.5)
        else:
            x = x * self.scale
        return self.act(self.inner(x))


class Branches(nn.ModuleDict):
    def __init__(self, g: Generator) -> None:
        super().__init__({name: g.block(g.pick((ConvAct, PreAct, Viewed))) for name in ("a", "b")})
        self.how = g.pick(("cat", "stack", "max", "where"))
        self.join = nn.Conv2d(2 * g.width, g.width, 1)
        self.act = Act(g, 1)

    def forward(self, x):
        a, b = (branch(x.clone()) for branch in (self["a"], self["b"]))
        if self.how == "cat":
            return self.act(self.join(torch.cat((a, b), dim=1)))
        if self.how == "stack":
            return self.act(torch.stack([a, b]).sum(0))
        return self.act(torch.maximum(a, b) if self.how == "max" else torch.where(a > b, a, 0.5 * b))


class Layout(nn.Module):
    """Memory in another order, pools and copies that change no channel."""

    def __init__(self, g: Generator) -> None:
        super().__init__()
        self.act = Act(g, 1, inplace=False)
        self.how = g.pick(("channels_last", "contiguous", "pool", "resize", "drop", "clone", "flip", "to"))
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x):
        if self.how == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif self.how == "contiguous":
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        elif self.how == "pool":
            x = F.max_pool2d(x, 3, 1, 1)
        elif self.how == "resize":
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
        elif self.how == "drop":
            x = F.dropout(self.drop(x), 0.1, self.training)
        elif self.how == "clone":
            x = x.clone()
        else:
            x = x.flip(2) if self.how == "flip" else x.to(x.dtype)
        return self.act(x)


BLOCKS = (
    *(ConvAct, PreAct, Residual, Residual, Gate, Split, Mixer, Attention, Shared, Viewed, ReadAgain),
    *(Derived, Branches, Layout),
)


class Generator:
    """Random choices, and the parts that several blocks are made of."""

    width = 4

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def pick(self, options):
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def conv(self) -> nn.Module:
        conv = nn.Conv2d(
            self.width, self.width, self.pick(((1, 1), (3, 3))), padding="same", groups=self.pick((1, 1, 2, 4))
        )
        if self.chance(0.08):
            (conv.register_forward_hook(_scaled) if self.chance(0.5) else conv.register_forward_pre_hook(_shifted))
        return nn.utils.parametrizations.weight_norm(conv) if self.chance(0.05) else conv

    def norm(self) -> nn.Module:
        norm = self.pick(
            (
                nn.BatchNorm2d,
                nn.BatchNorm2d,
                lambda c: nn.BatchNorm2d(c, affine=False),
                lambda c: nn.GroupNorm(2, c),
                nn.InstanceNorm2d,
            )
        )(self.width)
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        return norm

    def block(self, cls: type[nn.Module]) -> nn.Module:
        return cls(self)


class Network(nn.Module):
    """Stem, blocks and head: images [N, 3, 6, 6] to logits [N, 5]."""

    def __init__(self, seed: int, keep: list[int] | None = None) -> None:
        super().__init__()
        g = Generator(seed)
        self.stem = nn.Conv2d(3, g.width, 3, padding=1)
        blocks = [g.block(g.pick(BLOCKS)) for _ in range(g.pick((1, 2, 2, 3, 3, 4)))]
        self.blocks = nn.Sequential(*(blocks if keep is None else (blocks[k] for k in keep)))
        self.loop = g.chance(0.5)
        self.pool = g.pick(HEAD_POOLS)
        self.hidden, self.act = (nn.Linear(g.width, 6), Act(g, 1)) if g.chance(0.4) else (None, None)
        if self.act is not None and isinstance(self.act.act, nn.PReLU):
            self.act.act = nn.PReLU()
        self.head = nn.Linear(g.width if self.hidden is None else 6, 5)

    def forward(self, x):
        x = self.stem(x)
        if self.loop:
            for block in self.blocks:
                x = block(x)
        else:
            x = self.blocks(x)
        x = self.pool(x)
        if self.hidden is not None:
            x = self.act(self.hidden(x))
        return self.head(x)
