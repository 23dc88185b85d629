"""The tables of activations: every class of torch, timm and RobustBench is decided, and matched alike in each form."""

from __future__ import annotations

import copy
import functools
import importlib
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation

import meansparse_fx as msfx
from meansparse_fx import activations
from meansparse_fx.activations import match_function, match_module, register_activation
from meansparse_fx.capture import capture
from meansparse_fx.errors import SiteError
from meansparse_fx.export import to_exported_program
from meansparse_fx.kernels.reference import ACTIVATIONS
from meansparse_fx.zoo.robustbench_compat import library
from tests.models import Functional, mean_sparse

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)

# Make weights or probabilities of their input, not features.
NO_SITES = {"Sigmoid", "Hardsigmoid", "LogSigmoid", "GLU", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
ARGUMENTS = {"Threshold": (0.1, 0.0)}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(activations, "_REGISTERED_MODULES", dict(activations._REGISTERED_MODULES))
    monkeypatch.setattr(activations, "_REGISTERED_CALLS", dict(activations._REGISTERED_CALLS))


def network(act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 2, 1)).eval()


def check_bitwise(act: nn.Module, fused: bool) -> None:
    """Check that the activation is one site, and that at alpha 0 nothing has changed."""
    model = network(act)
    sparse = msfx.transform(model, IMAGES)
    (site,) = sparse.meta["plan"]
    assert (site.name, site.channel_dim, site.activation.fused) == ("1", 1, fused)
    assert torch.equal(sparse(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", sorted({*activation.__all__, "Softplus"} - {"MultiheadAttention"}))
def test_each_of_torch_s_activations_is_decided(name):
    module = getattr(nn, name)(*ARGUMENTS.get(name, ()))
    call = match_module(module)
    assert (call is None) == (name in NO_SITES)
    if call is not None:
        check_bitwise(module, call.fused)
        assert call.fused == (call.name in ACTIVATIONS)


@pytest.mark.parametrize("name", ["Sigmoid", "Hardsigmoid"])
def test_gates_are_no_sites_of_their_own(name):
    with pytest.raises(SiteError, match="no activation found"):
        msfx.inspect(network(getattr(nn, name)()), IMAGES)


FORMS = {  # module, functions, methods: one and the same activation
    "relu": (nn.ReLU(), (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    "relu6": (nn.ReLU6(), (F.relu6, (F.hardtanh, (0.0, 6.0))), ()),
    "hardtanh": (nn.Hardtanh(), (F.hardtanh, F.hardtanh_), ()),
    "celu": (nn.CELU(), (F.celu, torch.celu, torch.celu_), ()),
    "selu": (nn.SELU(), (F.selu, torch.selu, torch.selu_), ()),
    "tanh": (nn.Tanh(), (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_")),
    "softsign": (nn.Softsign(), (F.softsign,), ()),
    "hardshrink": (nn.Hardshrink(), (F.hardshrink,), ("hardshrink",)),
    "gelu": (nn.GELU(), (F.gelu,), ()),
    "gelu_tanh": (nn.GELU("tanh"), (), ()),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_the_same_activation(name):
    module, functions, methods = FORMS[name]
    expected = match_module(module)
    assert expected.name == name
    for target in (*functions, *methods):
        function, arguments = target if isinstance(target, tuple) else (target, ())
        call = match_function(function, (torch.ones(1), *arguments), {})
        assert (call.name, call.constants, call.fused) == (name, expected.constants, expected.fused)
        spelled = function if isinstance(function, str) else function.__name__
        assert call.inplace == spelled.endswith("_")


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.ops.aten.relu, "relu"),
        (torch.ops.aten.gelu.default, "gelu"),
        (torch.ops.aten.silu_, "silu"),
        (lambda x: torch.ops.aten.elu(x, 1.0, 2.0, 3.0), "elu"),
    ],
)
def test_operators_of_aten_keep_their_call(function, name):
    model = Functional(
        lambda self, x: self.head(function(self.conv(x))), conv=nn.Conv2d(3, 4, 3), head=nn.Conv2d(4, 2, 1)
    )
    images = torch.rand(2, 3, 8, 8)
    sparse = msfx.transform(model.eval(), images)
    (site,) = sparse.meta["plan"]
    assert (site.activation.name, site.activation.fused, site.skipped) == (name, False, None)
    assert torch.equal(sparse(images), model(images))
    assert match_function(torch.ops.aten.convolution, (), {}) is None


def test_in_place_spellings():
    assert match_module(nn.SELU(inplace=True)).inplace
    assert match_function(F.celu, (None, 2.0, True), {}).inplace
    assert match_function(F.hardtanh, (None,), {"inplace": True}).inplace


def test_a_hardtanh_like_relu6_is_one():
    assert match_module(nn.Hardtanh(0.0, 6.0)).name == "relu6"
    check_bitwise(nn.Hardtanh(0.0, 6.0), fused=True)
    check_bitwise(nn.Hardtanh(-1.0, 6.0), fused=False)


def test_a_threshold_of_zero_is_a_relu():
    assert match_function(F.threshold, (None, 0.0, 0.0), {}).name == "relu"
    assert match_function(torch.threshold_, (None, 0, 1), {}).name == "threshold"
    assert match_module(nn.Threshold(0.0, 0.0, inplace=True)).inplace
    check_bitwise(nn.Threshold(0.0, 0.0), fused=True)
    check_bitwise(nn.Threshold(0.0, 0.5), fused=False)


# Learned slopes: torch weights along dimension 1, the kernels along the channels.


class FunctionalPReLU(nn.PReLU):
    def forward(self, x):
        return F.prelu(x, self.weight)


def timms_prelu(count):
    pytest.importorskip("timm")
    return importlib.import_module("timm.layers.activations").PReLU(count)


SLOPES = {  # number of slopes, shape of the input, whether the kernels' row is the same
    "tokens": (5, (2, 5, 8), False),
    "as many tokens as channels": (8, (2, 8, 8), False),
    "an image with its channels last": (5, (2, 5, 6, 8), False),
    "one for all": (1, (2, 5, 8), True),
    "features": (8, (2, 8), True),
}


@pytest.mark.parametrize("prelu", [nn.PReLU, FunctionalPReLU, timms_prelu])
@pytest.mark.parametrize("case", SLOPES)
def test_learned_slopes_lie_along_dimension_one(prelu, case):
    """Alpha 0 in values and gradients; then the definition, with torch's own PReLU behind it."""
    count, shape, fused = SLOPES[case]
    torch.manual_seed(0)
    act = prelu(count)
    nn.init.uniform_(act.weight, -1, 1)
    model = nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 3)).eval()
    x = torch.randn(shape)
    sparse = msfx.transform(model, x)
    (site,) = sparse.meta["plan"]
    assert (site.channel_dim, site.activation.fused) == (len(shape) - 1, fused)
    assert torch.equal(sparse(x), model(x))
    for ours, theirs in zip(
        torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters())),
        torch.autograd.grad(model(x).square().sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    statistics = msfx.calibrate(sparse, [x], progress=False)
    msfx.set_alpha(sparse, 0.5)
    h = model[0](x)
    others = tuple(range(len(shape) - 1))
    centre, band = h.mean(others), 0.5 * h.std(others, correction=0)
    expected = model[2](F.prelu(torch.where((h - centre).abs() <= band, centre.expand_as(h), h), act.weight))
    torch.testing.assert_close(sparse(x), expected)
    torch.testing.assert_close(to_exported_program(sparse, x).module()(x), expected)
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend="meansparse", options={"statistics": statistics, "alpha": 0.5, "inner": "eager"}
    )
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.slow
def test_torch_compile_sees_relu6():
    """torch.nn.ReLU6 is a hardtanh there."""
    model = network(nn.ReLU6())
    compiled = torch.compile(model, backend="meansparse")
    compiled(IMAGES)
    assert [(s.name, s.activation.name) for s in msfx.compile_report(compiled).plan] == [("1", "relu6")]


# timm and RobustBench.

TIMM_GATES = {"sigmoid", "hard_sigmoid", "hardsigmoid", "identity"}


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_each_of_timms_activations_is_decided(memory_efficient):
    pytest.importorskip("timm")
    factory = importlib.import_module("timm.layers.create_act")
    for name, cls in (factory._ACT_LAYER_ME if memory_efficient else factory._ACT_LAYER_DEFAULT).items():
        call = match_module(cls())
        assert (call is None) == (name in TIMM_GATES), name
        if call is not None:
            check_bitwise(cls(), call.fused)


@pytest.mark.parametrize("name", ["Swish", "Mish", "HardSwish", "HardMish", "QuickGELU", "GELU", "GELUTanh", "Tanh"])
@pytest.mark.parametrize("inplace", [False, True])
def test_timms_own_classes(name, inplace):
    """Those that the factory passes over for torch's own, too."""
    module = importlib.import_module("timm.layers.activations") if pytest.importorskip("timm") else None
    act = getattr(module, name)(inplace=inplace)
    check_bitwise(act, fused=name in ("Swish", "GELU", "GELUTanh"))


@pytest.mark.parametrize("name", ["SwishMe", "MishMe", "HardSwishMe", "HardMishMe"])
def test_timms_memory_efficient_classes(name):
    pytest.importorskip("timm")
    check_bitwise(getattr(importlib.import_module("timm.layers.activations_me"), name)(), fused=False)


@pytest.mark.parametrize("name", ["StarReLU", "SquaredReLU"])
def test_squared_relus(name):
    """In place they leave something in their input that is not their result: then the ReLU within is the site."""
    pytest.importorskip("timm")
    cls = getattr(importlib.import_module("timm.models.metaformer"), name)
    check_bitwise(cls(), fused=False)
    model = network(cls(inplace=True))
    sparse = msfx.transform(model, IMAGES)
    (site,) = sparse.meta["plan"].active
    assert (site.name, site.activation.name, site.activation.fused) == ("1.relu", "relu", True)
    assert torch.equal(sparse(IMAGES), model(IMAGES))


class ReadLater(nn.Module):
    """Reads its activation's input again."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), act

    def forward(self, x):
        h = self.conv(x)
        return self.act(h) + h


@pytest.mark.parametrize(("function", "overwrites"), [("relu", True), ("silu", True), ("gelu", False), ("mish", True)])
@pytest.mark.parametrize("inplace", [False, True])
def test_gamma_activations(function, overwrites, inplace):
    """timm's functions take ``inplace``; some ignore it."""
    pytest.importorskip("timm")
    act = importlib.import_module("timm.models.nfnet").GammaAct(function, gamma=1.7, inplace=inplace)
    assert match_module(act).inplace == (inplace and overwrites)
    check_bitwise(act, fused=False)
    model = ReadLater(act).eval()
    assert torch.equal(msfx.transform(model, IMAGES)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_what_ignores_inplace_overwrites_nothing_for_others(function, inplace):
    """Between the readers of a Swish, timm's GELU leaves their input what it is; its SiLU makes the whole no Swish."""
    pytest.importorskip("timm")

    def forward(self, x):
        h = self.conv(x)
        gate = torch.sigmoid(h)
        return self.act(h) + h * gate

    act = importlib.import_module("timm.models.nfnet").GammaAct(function, gamma=1.7, inplace=inplace)
    model = Functional(forward, conv=nn.Conv2d(3, 4, 1), act=act).eval()
    sparse = msfx.transform(model, IMAGES)
    assert ("swish" in msfx.operators(sparse)) == (function == "gelu" or not inplace)
    assert torch.equal(sparse(IMAGES), model(IMAGES))


ROBUSTBENCH = [
    ("dm_wide_resnet", "Swish"),
    ("dm_rn", "Swish"),
    ("Meansparse_wrn_70_16", "Swish"),
    ("Meansparse_wrn_94_16", "Swish"),
    ("paf_wide_resnet", "PSSiLU"),
]


@pytest.mark.parametrize(("file", "name"), ROBUSTBENCH)
def test_robustbenchs_classes(file, name):
    library()
    act = getattr(importlib.import_module(f"robustbench.model_zoo.architectures.{file}"), name)()
    assert match_module(act).name == name.lower()
    check_bitwise(act, fused=name == "Swish")


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_custom_activation_computes_what_the_paper_says(alpha):
    """Against the definition in float64; the module's own gradient behind the operator's."""
    library()
    swish = importlib.import_module("robustbench.model_zoo.architectures.dm_wide_resnet").Swish()
    model = network(swish).double()
    images = IMAGES.double()
    sparse = msfx.transform(model, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, alpha)
    hidden = model[0](images)
    band = alpha * hidden.std((0, 2, 3), correction=0)[:, None, None]
    centre = hidden.mean((0, 2, 3))[:, None, None]
    snapped = torch.where((hidden - centre).abs() <= band, centre.expand_as(hidden), hidden) if alpha else hidden
    expected = model[2](snapped * torch.sigmoid(snapped))
    torch.testing.assert_close(sparse(images), expected, rtol=1e-12, atol=1e-12)  # float64 rounding of a mean
    x = images.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RobustBench's Swish asks for saved_variables
        sparse(x).sum().backward()
    y = images.clone().requires_grad_()
    hidden = model[0](y)
    kept = torch.where((hidden - centre).abs() <= band, centre.expand_as(hidden), hidden) if alpha else hidden
    model[2](F.silu(kept)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)  # two formulas of one derivative


# Registration.


class Squareplus(nn.Module):
    """Has a sigmoid-like piece inside and an attribute to read."""

    def __init__(self, b=1.0):
        super().__init__()
        self.b = b

    def forward(self, x):
        return (x + torch.sqrt(x * x + self.b)) / 2


class OwnLeakyReLU(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return F.relu(x) - self.slope * F.relu(-x)


class OwnPSiLU(nn.Module):
    def __init__(self, slopes=1.3):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(slopes))

    def forward(self, x):
        return x * torch.sigmoid(self.a * x)


def test_a_registered_class_is_a_site_and_a_leaf():
    model = network(Squareplus())
    with pytest.raises(SiteError, match=r"1: not known as an activation: div .*register_activation\(Squareplus, "):
        msfx.transform(model, IMAGES)
    register_activation(Squareplus, "squareplus")
    check_bitwise(Squareplus(), fused=False)
    graph = capture(model, IMAGES).graph_module.graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0", "1", "2"]


def test_a_subclass_is_not_meant():
    register_activation(Squareplus, "squareplus")
    assert match_module(type("Other", (Squareplus,), {})()) is None


def test_a_registered_row_is_fused_with_its_constants():
    assert not msfx.inspect(network(OwnLeakyReLU(0.2)), IMAGES).sites[0].activation.fused
    register_activation(OwnLeakyReLU, "leaky_relu", constants=lambda m: (m.slope,), fused=True)
    model = network(OwnLeakyReLU(0.2))
    sparse = msfx.transform(model, IMAGES)
    (site,) = sparse.meta["plan"]
    assert (site.activation.name, site.activation.constants, site.activation.fused) == ("leaky_relu", (0.2,), True)
    torch.testing.assert_close(sparse(IMAGES), model(IMAGES))


def test_a_registered_row_with_a_learned_slope():
    register_activation(OwnPSiLU, "psilu", weight="a", fused=True)
    model = network(OwnPSiLU())
    sparse = msfx.transform(model, IMAGES)
    torch.testing.assert_close(sparse(IMAGES), model(IMAGES))
    sparse(IMAGES).sum().backward()
    slope = sparse.get_parameter("1.a").grad
    model(IMAGES).sum().backward()
    torch.testing.assert_close(slope, model[1].a.grad)


@pytest.mark.parametrize(("slopes", "fused"), [([1.3, 0.5, -1.0, 2.0], True), ([[1.3], [0.5], [-1.0]], False)])
def test_registered_slopes_along_the_channels_are_the_rows(slopes, fused):
    """Of tokens, whose channels come last; along the tokens the kernels have no such row."""
    register_activation(OwnPSiLU, "psilu", weight="a", fused=True)
    model, x = nn.Sequential(nn.Linear(8, 4), OwnPSiLU(slopes)).eval(), torch.rand(2, 3, 8)
    sparse = msfx.transform(model, x)
    (site,) = sparse.meta["plan"]
    assert (site.channel_dim, site.activation.fused) == (2, fused)
    torch.testing.assert_close(sparse(x), model(x))


@fx.wrap
def own_function(x):
    return x * torch.sigmoid(2 * x)


def test_registered_functions_and_methods():
    register_activation(own_function, "own")
    register_activation(torch.erf, "erf")
    register_activation("erf", "erf")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return own_function(torch.erf(self.conv(x)).erf())

    model = Model().eval()
    sparse = msfx.transform(model, IMAGES)
    assert [(s.name, s.activation.fused) for s in sparse.meta["plan"]] == [
        ("erf", False),
        ("erf_1", False),
        ("own", False),
    ]
    assert torch.equal(sparse(IMAGES), model(IMAGES))


def plain_function(x, slope=2.0, *, shift=0.0):
    return x * torch.sigmoid(slope * x + shift)


def closure_over(slope):
    def closed(x):
        return x * torch.sigmoid(slope * x)

    return closed


HOME = types.SimpleNamespace(plain_function=plain_function)  # as an imported module has it


class HoldsFunctions(nn.Module):
    """Functions under every name that a model can have for them."""

    direct = staticmethod(plain_function)

    def __init__(self, closed):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.held, self.closed, self.several = plain_function, closed, {"act": plain_function}

    def forward(self, x):
        x = self.direct(self.held(plain_function(self.conv(x)), 3.0))
        return self.closed(self.several["act"](HOME.plain_function(x, shift=0.5)))


def test_a_plain_function_is_found_under_any_name():
    closed = closure_over(1.5)
    register_activation(plain_function, "plain")
    register_activation(closed, "closed")
    model = HoldsFunctions(closed).eval()
    expected = model(IMAGES)
    sparse = msfx.transform(model, IMAGES)
    assert [s.activation.name for s in sparse.meta["plan"]] == [*["plain"] * 5, "closed"]
    assert torch.equal(sparse(IMAGES), expected)
    assert torch.equal(model(IMAGES), expected)  # they are themselves again
    assert plain_function(torch.ones(())) == torch.sigmoid(torch.tensor(2.0))
    msfx.calibrate(sparse, IMAGES, progress=False)
    msfx.set_alpha(sparse, 0.4)
    assert not torch.equal(sparse(IMAGES), expected)
    assert torch.equal(copy.deepcopy(sparse)(IMAGES), sparse(IMAGES))


def test_registering_again_changes_the_mind():
    register_activation(nn.SiLU, "my_silu")
    assert match_module(nn.SiLU()).fused is False
    register_activation(nn.SiLU, "silu", fused=True)
    assert match_module(nn.SiLU()).fused is True


def test_the_fused_row_is_the_kernels():
    register_activation(Squareplus, "softplus", constants=(2.0, 20.0), fused=True)
    call = match_module(Squareplus())
    x, flat = torch.randn(2, 4), torch.zeros(4)
    expected = F.softplus(x, 2.0, 20.0)
    torch.testing.assert_close(mean_sparse(x, flat, flat - 1, 1, call.name, call.constants), expected)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"target": Squareplus, "name": "sine", "fused": True}, "have no activation 'sine'.*Drop fused=True"),
        ({"target": Squareplus, "name": "elu", "fused": True}, "0 constants given, the kernels' row takes alpha"),
        ({"target": Squareplus, "name": "psilu", "fused": True}, "has a learned slope; weight is None"),
        ({"target": Squareplus, "name": "relu", "fused": True, "weight": "b"}, "has no learned slope; weight is 'b'"),
        ({"target": Squareplus(), "name": "own"}, "is no module class, function or name"),
        ({"target": torch.Tensor.erf, "name": "own"}, "known by its name: 'erf'"),
        ({"target": functools.partial(F.relu), "name": "own"}, "no graph can name functools.partial"),
        ({"target": lambda x: x, "name": "own"}, "no graph can name <function <lambda>"),
        ({"target": 3, "name": "own"}, "is no module class, function or name"),
        ({"target": int, "name": "own"}, "is no module class, function or name"),
        ({"target": torch.erf, "name": "own", "constants": len}, "only a module class"),
        ({"target": torch.erf, "name": "own", "weight": "a"}, "only a module class"),
    ],
)
def test_what_cannot_be_registered(arguments, problem):
    with pytest.raises(SiteError, match=problem):
        register_activation(**arguments)
