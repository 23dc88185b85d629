"""Activations written out of other calls: one site, whatever the spelling; gates and the rest are left alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.errors import SiteError
from meansparse_fx.export import to_exported_program
from tests.models import Functional
from tests.test_published import Published

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ALPHA = 0.5

SPELLINGS = {
    "mish": (
        lambda x: x * torch.tanh(F.softplus(x)),
        lambda x: torch.mul(torch.log(1 + torch.exp(x)).tanh(), x),
        lambda x: x.mul(x.exp().add(1).log().tanh_()),
    ),
    "hardswish": (
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: F.relu6(3 + x, inplace=True) * (1 / 6) * x,
        lambda x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6,
        lambda x: F.hardsigmoid(x).mul(x),
        lambda x: x * (x + 3).clamp(0, 6) / 6,
        lambda x: x.mul_(F.relu6(x + 3.0).div_(6.0)),
    ),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    ),
    "gelu": (
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * (torch.erf(x / 1.41421) + 1) * 0.5,
    ),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x),),
    "swish": (
        lambda x: x * x.sigmoid(),
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: torch.sigmoid(0.7 * x).mul(x),
        lambda x: x.mul_(x.sigmoid()),
        lambda x: x * x.clone().sigmoid_(),
        lambda x: torch.special.expit(x) * x,
        lambda x: x * torch.sigmoid(x * torch.ones_like(x)),
        lambda x: x * torch.sigmoid(x * x.new_ones(1)),
        lambda x: (s := torch.sigmoid(x)) * x + torch.zeros(s.shape),  # a shape is no value of it
    ),
    "relu": (
        lambda x: x.clamp(min=0),
        lambda x: x.clamp_min_(0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.max(x, torch.zeros(1)),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x * (x > 0),
        lambda x: (x + x.abs()) / 2,
        lambda x: x.masked_fill(x < 0, 0),
        lambda x: torch.fmax(x, x.new_zeros(())),
        lambda x: torch.max(x, other=torch.zeros_like(x)),
        lambda x: x * (x > 0).int(),
        lambda x: torch.maximum(x, torch.full_like(x, 0.0)),
        lambda x: torch.maximum(x, torch.full_like(x, fill_value=0)),
        lambda x: torch.maximum(x, torch.full((1,), 0.0)),
        lambda x: torch.maximum(x, x.new_full((1,), 0.0)),
        lambda x: torch.maximum(x, torch.tensor(0.0)),
        lambda x: torch.maximum(x, torch.scalar_tensor(0.0)),
    ),
    "leaky_relu": (
        lambda x: torch.maximum(x, 0.1 * x),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: F.relu(x) - 0.1 * F.relu(-x),
        lambda x: 0.9 * F.relu(x) + 0.1 * x,  # one activation, scaled, and more than that
    ),
    "elu": (lambda x: torch.where(x > 0, x, torch.exp(x) - 1),),
    "relu6": (lambda x: x.clamp(0, 6), lambda x: F.relu(x).clamp(max=6)),
}
CASES = [(name, number) for name, spellings in SPELLINGS.items() for number in range(len(spellings))]


class Written(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 2, 1)).eval()


def rows_of(plan: msfx.SitePlan) -> list[tuple[str, str, str]]:
    """Return name, activation and first words of the reason of each site."""
    return [(s.name, s.activation.name, s.refusal.kind if s.refusal else "") for s in plan]


def rows(model: nn.Module) -> list[tuple[str, str, str]]:
    return rows_of(msfx.inspect(model.eval(), IMAGES))


def names_in(forward, **children) -> list[tuple[str, str, str]]:
    return rows(Functional(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1), **children))


def snapped(h: torch.Tensor) -> torch.Tensor:
    """The operator by its definition, with the statistics of the tensor itself."""
    centre, deviation = h.mean((0, 2, 3)), h.std((0, 2, 3), correction=0)
    centre, band = centre[:, None, None], ALPHA * deviation[:, None, None]
    return torch.where((h - centre).abs() <= band, centre.expand_as(h), h).clone()


def plug_in(model: nn.Module, **options) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend="meansparse", options={"inner": "eager", **options})


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_spelling_is_one_site_before_the_whole(name, number):
    """Bitwise at alpha 0, gradients included; then the operator by hand, and the activation's own code behind it."""
    function = SPELLINGS[name][number]
    model = network(Written(function))
    sparse = msfx.transform(model, IMAGES)
    (site,) = sparse.meta["plan"]
    assert (site.name, site.activation.name, site.activation.fused) == ("1", name, False)
    assert (site.producer, site.channel_dim, site.skipped) == ("conv", 1, None)
    results = []
    for module in (sparse, model):
        x = IMAGES.clone().requires_grad_()
        y = module(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    assert all(map(torch.equal, *results))
    msfx.calibrate(sparse, [IMAGES], progress=False)
    msfx.set_alpha(sparse, ALPHA)
    torch.testing.assert_close(sparse(IMAGES), model[2](function(snapped(model[0](IMAGES)))))
    assert torch.equal(msfx.restore(sparse)(IMAGES), model(IMAGES))


class Mish(nn.Module):
    def __init__(self):
        super().__init__()
        self.softplus, self.tanh, self.drop = nn.Softplus(), nn.Tanh(), nn.Dropout()

    def forward(self, x):
        return self.drop(x * self.tanh(self.softplus(x)))


class HardSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class HardSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = HardSigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


class LearnedSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([1.5, 0.7, 0.2, 1.1]))

    def forward(self, x):
        return x * torch.sigmoid(self.beta.view(1, -1, 1, 1) * x)


def hard_swish(x):
    return x * F.relu6(x + 3) / 6


class Laplace(nn.Module):
    def forward(self, x):
        return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


class Excitation(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), HardSigmoid()

    def forward(self, x):
        return x * self.gate(self.excite(hard_swish(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class Everything(nn.Module):
    """Modules that are called again, nested ones, functions, residuals, gates, and an input in place read later."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act, self.swish, self.se = nn.Sequential(nn.Sequential(Mish())), LearnedSwish(), Excitation()
        self.gate, self.hard, self.laplace = HardSigmoid(), HardSwish(), Laplace()
        self.inplace = Written(lambda x: x.mul_(torch.sigmoid(x)))

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.se(hard_swish(x + self.conv(self.act(x))))
        x = self.conv(x) * self.gate(self.conv(x))
        y = self.conv(x)
        x = self.swish(self.inplace(y)) + y
        x = self.conv(self.laplace(self.conv(hard_swish(x))))
        return self.conv(self.hard(self.conv(x) * torch.sigmoid(x)))


EVERYTHING = [
    ("act.0.0", "mish", ""),
    ("act.0.0_1", "mish", ""),
    ("hardswish", "hardswish", ""),
    ("se.hardswish", "hardswish", "gate"),
    ("se.gate.relu", "relu6", "gate"),
    ("gate.relu", "relu6", "gate"),
    ("inplace", "swish", ""),
    ("swish", "swish", ""),
    ("hardswish_1", "hardswish", ""),
    ("laplace", "unknown", "not known as an activation"),
    ("hard", "hardswish", ""),
]


@pytest.fixture
def everything():
    torch.manual_seed(0)
    return Everything().eval()


def test_sites_and_values_are_the_same_in_every_route(everything):
    assert rows(everything) == EVERYTHING
    sparse = msfx.transform(everything, IMAGES)
    assert torch.equal(sparse(IMAGES), everything(IMAGES))
    statistics = msfx.calibrate(sparse, [IMAGES], progress=False)
    msfx.set_alpha(sparse, ALPHA)
    compiled = plug_in(everything, statistics=statistics, alpha=ALPHA)
    torch.testing.assert_close(compiled(IMAGES), sparse(IMAGES))
    assert rows_of(msfx.compile_report(compiled).plan) == EVERYTHING
    torch.testing.assert_close(to_exported_program(sparse, IMAGES).module()(IMAGES), sparse(IMAGES))
    fused = msfx.transform(everything.requires_grad_(False), IMAGES, statistics=statistics, alpha=ALPHA, fuse="all")
    torch.testing.assert_close(fused(IMAGES), sparse(IMAGES))
    assert torch.equal(msfx.restore(sparse)(IMAGES), everything(IMAGES))


def test_observers_of_the_plug_in_stand_before_the_whole(everything):
    statistics = msfx.calibrate(msfx.transform(everything, IMAGES), [IMAGES], progress=False)
    observed = plug_in(everything, observe=True)
    observed(IMAGES)
    seen = msfx.compile_report(observed).statistics()
    assert list(seen) == list(statistics)
    for name in seen:
        torch.testing.assert_close(seen[name].mean, statistics[name].mean)


@pytest.mark.parametrize("act", [lambda h: h.mul_(torch.sigmoid(h)), lambda h: h * torch.sigmoid(h), F.silu])
def test_an_input_of_the_graph_is_overwritten_all_the_same(act):
    """The graph is broken before: who reads the tensor later, beyond the graph, finds there what the base writes."""

    def forward(self, x):
        h = self.conv(x)
        torch._dynamo.graph_break()
        y = act(h)
        torch._dynamo.graph_break()
        return self.last(y) + h

    torch.manual_seed(0)
    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval()
    compiled = plug_in(model)
    with torch.no_grad():
        assert torch.equal(compiled(IMAGES), model(IMAGES))
    assert [s.name for s in msfx.compile_report(compiled).plan.active] == ["silu" if act is F.silu else "swish"]


# What is none, or cannot be one.


@pytest.mark.parametrize(
    "act", [HardSigmoid(), Written(lambda x: F.hardtanh(torch.add(0.5, x, alpha=1 / 6), 0.0, 1.0))]
)
def test_part_of_a_hard_sigmoid_is_no_site(act):
    (site,) = msfx.inspect(network(act), IMAGES)
    assert site.skipped == "gate: part of a hardsigmoid, which makes a weight of its input and no feature"


UNKNOWN = [
    *(torch.sin, torch.asinh, Laplace()),
    lambda x: x + torch.sin(x) ** 2,
    lambda x: x * x,
    lambda x: torch.div(1, x.abs() + 1),
    lambda x: x * torch.tanh(torch.exp(x)),
    lambda x: x * torch.log(1 + torch.sigmoid(x)),
    lambda x: x * torch.sigmoid(x + 1),
    lambda x: 1 / (x.exp() + 2),
]


@pytest.mark.parametrize("act", UNKNOWN)
def test_what_is_in_no_table_is_in_the_plan(act):
    model = network(Written(act)) if not isinstance(act, nn.Module) else network(act)
    (site,) = msfx.inspect(model, IMAGES)
    name = type(model[1]).__name__
    assert site.name == "1"
    assert (site.refusal.kind, site.refusal.node) == ("not known as an activation", site.node)
    assert site.refusal.cure.startswith("if it is one, make it known")
    assert "computed from 0, element by element" in site.skipped
    assert f"meansparse_fx.register_activation({name}, ...)" in site.skipped
    with pytest.raises(SiteError, match=r"none of the 1 candidate sites can be rewritten.*register_activation"):
        msfx.transform(model, IMAGES)


def test_a_square_of_a_relu_is_the_relu_and_what_is_not_known():
    assert rows(network(Written(lambda x: F.relu(x) ** 2))) == [
        ("1.relu", "relu", ""),
        ("1", "unknown", "not known as an activation"),
    ]


NONE = {
    "gate of another tensor": lambda self, h: h * torch.sigmoid(self.last(h)),
    "gate of its own mean": lambda self, h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "gate of its own norm": lambda self, h: h * torch.sigmoid(self.norm(h)),
    "linear unit": lambda self, h: h[:, :2].repeat(1, 2, 1, 1) * torch.sigmoid(h),
    "root mean square": lambda self, h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
    "layer norm": lambda self, h: (h - h.mean(1, True)) / ((h - h.mean(1, True)) ** 2).mean(1, True).sqrt(),
    "batch norm": lambda self, h: (h - self.norm.running_mean.mean()) / torch.sqrt(self.norm.running_var.mean() + 1e-5),
    "softmax": lambda self, h: torch.exp(h) / torch.exp(h).sum(1, keepdim=True),
    "sigmoid": lambda self, h: 1 / (1 + torch.exp(-h)),
    "generalised mean": lambda self, h: h.clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3),
    "distance": lambda self, h: (h.pow(2).sum(1, keepdim=True) - 2 * h + 1).clamp(min=0).sqrt(),
    "quantiser": lambda self, h: torch.round(h / 0.1) * 0.1,
    "overflow guard": lambda self, h: h.clamp(-65504, 65504),
    "LayerScale": lambda self, h: h * self.norm.weight.view(-1, 1, 1) + 1,
    "not of a layer": lambda self, h: torch.sin(F.avg_pool2d(h, 3, 1, 1)),
    "of a vector alone": lambda self, h: h * torch.sin(self.norm.weight).view(-1, 1, 1),
    "mean of magnitudes": lambda self, h: h.abs().mean((2, 3), keepdim=True),
    "kernel of attention": lambda self, h: torch.sin(h) @ h.mT,
    "kernel of attention, reshaped": lambda self, h: torch.sin(h).transpose(2, 3) @ h,
    "weight of a mean": lambda self, h: (h * torch.sin(h)).mean(1, keepdim=True).expand_as(h),
    "of a broadcast": lambda self, h: (p := h.mean((2, 3), keepdim=True)) * torch.sigmoid(p + torch.zeros(6, 6)),
    "masked by a buffer": lambda self, h: h.masked_fill(self.norm.running_mean.view(-1, 1, 1) > 0, 0),
}


def dropped_in_between(self, h):
    gate = torch.sigmoid(h)
    F.dropout(h, 0.5, training=True, inplace=True)
    return h * gate


NONE["gate of what it was before"] = dropped_in_between


@pytest.mark.parametrize("name", NONE)
def test_gates_norms_and_means_are_no_activations(name):
    """The ReLU that stands behind is the only row."""
    found = names_in(lambda self, x: F.relu(self.last(NONE[name](self, self.conv(x)))), norm=nn.BatchNorm2d(4))
    assert found == [("relu", "relu", "")]


KNOWN = {  # next to other element-wise calls they stay what they are, fused and by their own names
    "scaled": lambda h: F.relu(h) * 1.0,
    "around it a sum": lambda h: F.relu(h) + h,
    "there and back": lambda h: F.relu(h * 2) / 2,
    "in another type": lambda h: F.relu(h.float()).type_as(h),
    "of a multiple": lambda h: F.relu(h * 2) / 6,
    "there and back by a tensor": lambda h: F.relu(h * torch.tensor(2.0)) / torch.tensor(2.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_an_activation_among_scalings_stays_fused(name):
    (site,) = msfx.inspect(network(Written(KNOWN[name])), IMAGES)
    assert (site.name, site.activation.fused, site.skipped) == ("1.relu", True, None)


def test_a_part_that_others_read_is_a_reason():
    def forward(self, x):
        h = self.conv(x)
        gate = torch.sigmoid(h)
        return self.last(h * gate) * gate

    (site,) = msfx.inspect(Functional(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval(), IMAGES)
    assert site.skipped == (
        "shared: others read sigmoid inside of it, so that no operator can stand before the activation alone"
    )


def test_applied_twice_it_is_two():
    assert names_in(lambda self, x: self.last(hard_swish(hard_swish(self.conv(x))))) == [
        ("hardswish", "hardswish", ""),
        ("hardswish_1", "hardswish", ""),
    ]


def test_parts_that_others_read_are_what_they_are_by_themselves():
    """Not the weight, nor the unknown function, that they are a part of."""

    def weight(self, x):
        r = F.relu6(self.conv(x) + 3)
        return self.last(r) * (r / 6)

    def unknown(self, x):
        h = self.conv(x)
        t = torch.tanh(torch.exp(h))
        return self.last(h * t) + self.last(t)

    assert names_in(weight) == [("relu6", "relu6", "")]
    assert names_in(unknown) == [("tanh", "tanh", "")]


def test_a_learned_activation_inside_is_a_site_of_its_own():
    model = Functional(
        lambda self, x: self.last(0.5 * (F.relu(h := self.conv(x)) + self.prelu(h))),
        **{"conv": nn.Conv2d(3, 4, 3), "last": nn.Conv2d(4, 4, 1), "prelu": nn.PReLU()},
    )
    assert rows_of(msfx.inspect(model.double().eval(), IMAGES.double())) == [
        ("relu", "relu", ""),
        ("prelu", "prelu", ""),
    ]


def test_what_is_in_no_table_is_seen_before_a_layer_scale():
    def forward(self, x):
        scaled = torch.sin(self.conv(x)).flatten(2) * self.scale.weight.view(-1, 1)
        return self.last(scaled.unflatten(2, (6, 6)))

    assert names_in(forward, scale=nn.BatchNorm2d(4)) == [("unknown", "unknown", "not known as an activation")]


CONSTANTS = {  # what a model keeps or computes, and the activation that it makes
    "zero-initialised": (lambda self, x: x * torch.sigmoid(self.zero * x), "swish"),
    "a buffer of zeros": (lambda self, x: torch.maximum(x, self.none), "relu"),
    "computed zeros": (lambda self, x: torch.maximum(x, self.none * 2), "relu"),
    "a product": (lambda self, x: x * torch.sigmoid(F.linear(self.row, self.row) * x), "swish"),
    "a slope in another shape": (lambda self, x: torch.maximum(x, self.slope.view(1, -1, 1, 1) * x), "leaky_relu"),
    "an element": (lambda self, x: torch.maximum(x, self.slope[0] * x), "leaky_relu"),
    "a cast": (lambda self, x: torch.maximum(x, self.slope.view(4, 1, 1).float() * x), "leaky_relu"),
    "softened": (lambda self, x: x * torch.sigmoid(self.slope.exp().view(-1, 1, 1) * x), "swish"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_a_model_make_activations(name):
    function, expected = CONSTANTS[name]
    act = Functional(function)
    act.zero = nn.Parameter(torch.zeros(4, 1, 1))
    act.slope = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.25]))
    act.register_buffer("none", torch.zeros(4, 1, 1))
    act.register_buffer("row", torch.ones(1, 4))
    assert [row[:2] for row in rows(network(act))] == [("1", expected)]


# In place.


def test_what_overwrites_its_input_and_returns_another_tensor_is_refused():
    assert names_in(lambda self, x: self.last((h := self.conv(x)).add_(h.abs()) / 2)) == [("relu", "relu", "in place")]


def test_later_readers_of_an_overwritten_input_read_the_result():
    def forward(self, x):
        h = self.conv(x)
        y = h.mul_(torch.sigmoid(h))
        return self.last(y) + h

    torch.manual_seed(0)
    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval()
    sparse = msfx.transform(model, IMAGES)
    msfx.calibrate(sparse, [IMAGES], progress=False)
    msfx.set_alpha(sparse, ALPHA)
    y = F.silu(snapped(model.conv(IMAGES)))
    torch.testing.assert_close(sparse(IMAGES), model.last(y) + y)


def test_a_view_of_an_overwritten_input_is_an_error():
    def forward(self, x):
        h = self.conv(x)
        view = h.flatten(2)
        return self.last(h.mul_(torch.sigmoid(h))).mean() + view.mean()

    with pytest.raises(SiteError, match="swish: the activation works in place, and mean later reads"):
        names_in(forward)


def test_an_input_that_was_overwritten_before():
    def forward(self, x):
        h = self.conv(x)
        F.relu_(h)
        return self.last(h * torch.sigmoid(h))

    torch.manual_seed(0)
    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval()
    sparse = msfx.transform(model, IMAGES)
    msfx.calibrate(sparse, [IMAGES], progress=False)
    assert [s.name for s in sparse.meta["plan"].active] == ["relu", "swish"]
    msfx.set_alpha(sparse, {"relu": 0.0, "swish": ALPHA})
    torch.testing.assert_close(sparse(IMAGES), model.last(F.silu(snapped(F.relu(model.conv(IMAGES))))))


def doubled_by_a_view(h):
    gate = torch.sigmoid(h)
    h[:, :2].mul_(2)
    return h * gate


def doubled_by_an_assignment(h):
    gate = torch.sigmoid(h)
    h[:, :2] *= 2
    return h * gate


def doubled_under_a_view(h):
    flat = h.flatten(2)
    gate = torch.sigmoid(flat)
    h.mul_(2)
    return (flat * gate).view_as(h)


@pytest.mark.parametrize("act", [doubled_by_a_view, doubled_by_an_assignment, doubled_under_a_view])
def test_what_others_overwrite_between_its_readers_is_refused(act):
    """An operator before the first reader would keep from the second what was written in between."""
    (site,) = msfx.inspect(Functional(lambda self, x: act(self.conv(x)), conv=nn.Conv2d(3, 4, 3)).eval(), IMAGES)
    assert site.skipped.endswith("in place: mul overwrites its input between the calls that read it")


def filled_by_halves(h):
    swapped = torch.zeros_like(h)
    swapped[:, ::2], swapped[:, 1::2] = h[:, 1::2], h[:, ::2]
    return swapped


def filled_by_a_copy(h):
    other = torch.empty_like(h)
    other.copy_(h)
    return other


def filled_by_out(h):
    return torch.mul(h, 2, out=torch.empty_like(h))


def doubled_in_part(h):
    h[:, :2] *= 2
    return h


@pytest.mark.parametrize("fill", [filled_by_halves, filled_by_a_copy, filled_by_out, doubled_in_part])
def test_an_input_that_was_filled_before(fill):
    """Zeros that were written to are zeros no more, and no other function of what they are like."""

    def swish(self, x):
        h = fill(self.conv(x).detach())
        return self.last(h * torch.sigmoid(h))

    torch.manual_seed(0)
    model = Functional(swish, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval()
    sparse = msfx.transform(model, IMAGES)
    assert rows_of(msfx.inspect(sparse)) == [("swish", "swish", "")]
    msfx.calibrate(sparse, [IMAGES], progress=False)
    msfx.set_alpha(sparse, ALPHA)
    expected = model.last(F.silu(snapped(fill(model.conv(IMAGES).detach()))))
    torch.testing.assert_close(sparse(IMAGES), expected)


# Beside other kinds of sites.


def test_a_sum_that_a_written_out_activation_alone_reads_is_covered():
    def forward(self, x):
        h = self.conv(x)
        return self.last(hard_swish(h + self.last(F.relu(h))))

    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)).eval()
    plan = msfx.inspect(model, IMAGES, placement=msfx.Placement(kinds=("activation", "residual_sum")))
    assert {s.name: s.skipped for s in plan if s.kind != "residual_branch"} == {
        "relu": None,
        "residual_sum": "covered: read by hardswish alone",
        "hardswish": None,
    }


def test_a_published_operator_before_one_is_taken_over():
    model = Functional(
        lambda self, x: self.last(hard_swish(self.operator(self.conv(x)))),
        conv=nn.Conv2d(3, 4, 3),
        last=nn.Conv2d(4, 4, 1),
        operator=Published(4),
    ).eval()
    sparse = msfx.transform(model, IMAGES)
    (site,) = sparse.meta["plan"]
    assert (site.name, site.kind, site.activation.name) == ("hardswish", "activation", "hardswish")
    torch.testing.assert_close(sparse(IMAGES), model(IMAGES))


def test_a_registered_class_is_what_it_was_registered_as():
    class Own(Mish):
        pass

    msfx.register_activation(Own, "mish", fused=True)
    assert msfx.inspect(network(Own()), IMAGES).sites[0].activation.fused


class Clipped(nn.Module):
    """A class of the user's own, which is called as a whole once it is registered."""

    def forward(self, x):
        return x.clamp(0, 6)


@pytest.mark.parametrize("inner", [nn.ReLU6(), Clipped()], ids=["torch's", "registered"])
def test_a_known_module_inside_of_an_activation_is_a_part_of_it(inner):
    msfx.register_activation(Clipped, "relu6")
    hard = Functional(lambda self, x: x * self.inner(x + 3) / 6, inner=inner)
    assert rows(network(hard)) == [("1", "hardswish", "")]
    assert rows(network(Functional(lambda self, x: self.inner(x), inner=inner))) == [("1.inner", "relu6", "")]


@pytest.mark.parametrize("conv", ["conv", "full", "ones", "max"])
@pytest.mark.parametrize("clip", ["clip", "detach", "clone", "round", "zeros"])
def test_a_modules_name_says_nothing_of_what_it_computes(conv, clip):
    def forward(self, x):
        h = getattr(self, conv)(x)
        return self.last(h * getattr(self, clip)(h + 3) / 6)

    parts = {conv: nn.Conv2d(3, 4, 3), clip: nn.ReLU6(), "last": nn.Conv2d(4, 4, 1)}
    assert rows(Functional(forward, **parts)) == [("hardswish", "hardswish", "")]


@pytest.mark.parametrize("inner", [nn.PReLU(), nn.RReLU()], ids=["learned", "random"])
def test_a_module_that_is_no_function_of_a_number_is_part_of_none(inner):
    leaky = Functional(lambda self, x: torch.maximum(self.inner(x), 0.1 * x), inner=inner)
    assert [name for name, *_ in rows(network(leaky))] == ["1.inner"]


def test_a_value_that_an_activation_reads_by_two_names_cannot_be_replaced_before_it():
    def forward(self, x):
        h = self.conv(x)
        positive = F.relu_(h)
        return self.last(h * torch.sigmoid(positive))

    assert names_in(forward) == [("relu", "relu", ""), ("swish", "swish", "in place")]


def test_an_activation_that_is_copied_for_several_readers_is_one_site():
    def forward(self, x):
        y = self.stem(x).clamp(0, 6)
        return self.stem(y.clone()) - y.clone().to(torch.float32).sum(1, keepdim=True)

    model = Functional(forward, stem=nn.Conv2d(3, 3, 1)).eval()
    (site,) = msfx.inspect(model, torch.rand(2, 3, 4, 4))
    assert (site.name, site.activation.name, site.skipped) == ("relu6", "relu6", None)


def clamped_twice(h):
    h.clamp_(min=0)
    h.clamp_(max=6)


def clamped_under_another_name(h):
    below = h.clamp_(min=0)
    below.clamp_(max=6)


def clamped_by_keyword(h):
    torch.clamp_(input=h, min=0)
    torch.clamp_(max=6, input=h)


def masked_twice(h):
    h.masked_fill_(h <= 0, 0.0)
    h.masked_fill_(h > 6, 6.0)


def assigned_twice(h):
    h[h < 0] = 0
    h[h > 6] = 6


def assigned(h):
    h[h < 0] = 0


def multiplied(h):
    h *= torch.sigmoid(h)


STATEMENTS = {
    clamped_twice: "relu6",
    clamped_under_another_name: "relu6",
    clamped_by_keyword: "relu6",
    masked_twice: "relu6",
    assigned_twice: "relu6",
    assigned: "relu",
    multiplied: "swish",
}


@pytest.mark.parametrize("statements", STATEMENTS)
def test_statements_that_overwrite_one_tensor(statements):
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 4, 3), 8 * torch.randn(4, 3, 8, 8)

    def function(self, x):
        h = self.conv(x) * 2
        statements(h)
        return h * 3

    sparse = msfx.transform(Functional(function, conv=conv).eval(), images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.5)
    ((name, operator),) = msfx.operators(sparse).items()
    assert name == STATEMENTS[statements]

    def expected(x):
        h = conv(x) * 2
        mean, band = (t[:, None, None] for t in (operator.mean, 0.5 * operator.std))
        h = torch.where((h - mean).abs() <= band, mean.expand_as(h), h)
        statements(h)
        return h * 3

    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours, theirs = sparse(a), expected(b)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
