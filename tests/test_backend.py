"""torch.compile(backend="meansparse"): the same sites, values and gradients as transform's, whatever Dynamo does."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import meansparse_fx as msfx
from meansparse_fx.backend import compile_report
from meansparse_fx.errors import CalibrationError, SiteError, StateError, StatisticsError
from tests.models import Functional


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def plug_in(model, fullgraph=True, **options):
    """Return the model compiled by the plug-in; run as it is unless a test says otherwise."""
    options = {"inner": "eager"} | options
    return torch.compile(model, backend="meansparse", fullgraph=fullgraph, options=options)


def calibrated(net, images, **arguments):
    sparse = msfx.transform(net, images, **arguments)
    return sparse, msfx.calibrate(sparse, [images], progress=False)


def gradients(model, images):
    x = images.clone().requires_grad_()
    y = model(x)
    parameters = [p for n, p in model.named_parameters() if "meansparse" not in n and "unused" not in n]
    return y, *torch.autograd.grad(y.square().sum(), [x, *parameters])


class Excited(nn.Module):
    """A block with squeeze-and-excitation, whose own activation is no site, and a child called by number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid())
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.bias = nn.Parameter(torch.rand(8))

    def forward(self, x):
        x = self.stem(x) * self.scale
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        return F.leaky_relu(x, 0.2).flatten(2).mean(-1) + F.relu(self.bias)


def resnet(_):
    return pytest.importorskip("torchvision").models.resnet18(num_classes=3), torch.rand(2, 3, 32, 32)


def convnext(_):
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8,) * 4, num_classes=3), torch.rand(
        2, 3, 64, 64
    )


def vit(_):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes), torch.rand(2, 3, 32, 32)


def tiny(net):
    return net, torch.rand(12, 3, 9, 9)


def excited(_):
    return Excited(), torch.rand(4, 3, 9, 9)


@pytest.mark.parametrize("make", [tiny, excited, pytest.param(resnet, marks=pytest.mark.slow), convnext, vit])
def test_same_sites_and_values_as_transform(net, make):
    torch.manual_seed(0)
    model, images = make(net)
    sparse, stats = calibrated(model.eval(), images)
    msfx.set_alpha(sparse, 0.3)
    compiled = plug_in(model, statistics=stats, alpha=0.3)
    torch.testing.assert_close(compiled(images), sparse(images), rtol=1e-5, atol=1e-6)
    assert not torch.equal(compiled(images), model(images))
    report = compile_report(compiled)
    rows = ("name", "channel_dim", "channels", "shape", "skipped")
    expected = [[getattr(s, r) for r in rows] for s in msfx.inspect(model, images)]
    assert [[getattr(s, r) for r in rows] for s in report.plan] == expected
    assert [s.producer for s in report.plan.active] == [s.producer for s in msfx.inspect(model, images).active]
    assert list(report.operators) == list(msfx.operators(sparse))


class Checkpointed(nn.Module):
    """One checkpoint within another, and a padding between a layer and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.SiLU()

    def _inner(self, x):
        return self.act(F.pad(self.inner(x), (1, 1)))

    def _outer(self, x):
        return F.gelu(self.outer(x)) + checkpoint(self._inner, self.outer(x), use_reentrant=False)[..., 1:-1]

    def forward(self, x):
        return F.relu(self.inner(checkpoint(self._outer, x, use_reentrant=False)))


def test_checkpointed_parts_have_sites_and_derivatives():
    model, images = Checkpointed().eval(), torch.rand(2, 3, 5, 5)
    sparse, stats = calibrated(model, images)
    assert len(stats) == 3
    msfx.set_alpha(sparse, 0.5)
    compiled = plug_in(model, statistics=stats, alpha=0.5)
    for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backward", ["exact", "identity", "smooth"])
def test_same_gradients_as_transform(net, images, inner, backward):
    sparse, stats = calibrated(net, images, backward=backward)
    msfx.set_alpha(sparse, 0.5)
    compiled = plug_in(net, statistics=stats, alpha=0.5, backward=backward, inner=inner)
    # Inductor's cache on disk knows this graph from the other backward modes: it must not mix them up.
    for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_alpha_changes_without_recompiling(net, images, inner):
    sparse, stats = calibrated(net, images)
    compiled = plug_in(net, statistics=stats, alpha=0.4, inner=inner)
    compiled(images)
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha in (0.8, {"relu": 0.0, "gelu": 0.1}, 0.0):
            compile_report(compiled).set_alpha(alpha)
            msfx.set_alpha(sparse, alpha)
            torch.testing.assert_close(compiled(images), sparse(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled(images), net(images), rtol=1e-5, atol=1e-6)


def test_a_backward_mode_is_compiled_once(net, images):
    from torch._dynamo.utils import counters

    sparse, _ = calibrated(net, images)
    msfx.set_alpha(sparse, 0.5)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    gradients(compiled, images)
    for mode, graphs in (("identity", 1), ("exact", 0), ("identity", 0)):
        counters.clear()
        msfx.set_backward(sparse, mode)
        for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_inductor(net, images, mode):
    sparse, stats = calibrated(net, images)
    msfx.set_alpha(sparse, 0.5)
    compiled = plug_in(net, statistics=stats, alpha=0.5, inner="inductor", mode=mode)
    for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast(net, images, inner):
    sparse, stats = calibrated(net, images)
    msfx.set_alpha(sparse, 0.5)
    compiled = plug_in(net, statistics=stats, alpha=0.5, inner=inner)
    seen = {}
    for name, operator in msfx.operators(sparse).items():
        operator.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].dtype, y.dtype)}))
    with torch.autocast("cpu", torch.bfloat16):
        own, expected = compiled(images), sparse(images)
    assert all(before == after for before, after in seen.values())
    assert torch.bfloat16 in {before for before, _ in seen.values()}
    assert {m.std.dtype for m in compile_report(compiled).operators.values()} == {torch.float32}
    assert own.dtype == expected.dtype
    # Two roundings of bfloat16 (2^-8 each) where Inductor keeps float32 between operators.
    torch.testing.assert_close(own, expected, rtol=2**-7, atol=2**-7)


def test_compilers_see_standard_operators_and_no_constants(net, images):
    _, stats = calibrated(net, images)
    seen = []

    def compiler(graph_module, _inputs):
        seen.append({n.target for n in graph_module.graph.nodes if n.op == "call_function"})
        return graph_module

    from torch._dynamo.backends.common import aot_autograd

    plug_in(net, statistics=stats, alpha=0.4, inner=aot_autograd(fw_compiler=compiler))(images)
    assert all(str(target).startswith("aten.") or "getitem" in str(target) for target in seen[0])
    assert torch.ops.aten.where.self in seen[0]


def test_statistics_by_path(net, images, tmp_path):
    sparse, stats = calibrated(net, images)
    stats.save(tmp_path / "s.safetensors")
    msfx.set_alpha(sparse, 0.3)
    compiled = plug_in(net, statistics=str(tmp_path / "s.safetensors"), alpha={"relu": 0.3})
    compiled(images)
    assert {n: float(m.alpha) for n, m in compile_report(compiled).operators.items() if m.alpha} == {
        "relu": pytest.approx(0.3)
    }


def test_recompilations_share_operators(net, images):
    sparse, stats = calibrated(net, images)
    compiled = plug_in(net, statistics=stats, alpha=0.3, inner="aot_eager")
    compiled(images[:2])
    report = compile_report(compiled)
    operators = dict(report.operators)
    report.set_alpha(0.6)
    msfx.set_alpha(sparse, 0.6)
    for batch in (images, images[:5]):  # the first makes the batch size dynamic, the second finds it so
        torch.testing.assert_close(compiled(batch), sparse(batch), rtol=1e-5, atol=1e-6)
    assert (report.compilations, len(report.graphs), report.operators) == (2, 1, operators)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_backward_of_a_call_made_before_a_recompilation(net, images, inner):
    sparse, stats = calibrated(net, images)
    msfx.set_alpha(sparse, 0.5)
    compiled = plug_in(net, statistics=stats, alpha=0.5, inner=inner)
    batches = images[:1], images  # of one image there is another graph
    grads = []
    for model, weight in ((compiled, net.conv1.weight), (sparse, sparse.conv1.weight)):
        loss = sum(model(batch).square().sum() for batch in batches)
        grads += torch.autograd.grad(loss, weight)
    assert compile_report(compiled).compilations == 2
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_inference_mode_first_then_gradients(net, images):
    sparse, stats = calibrated(net, images)
    msfx.set_alpha(sparse, 0.3)
    compiled = plug_in(net, statistics=stats, alpha=0.3)
    with torch.inference_mode():
        compiled(images)
    for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(net, images, dtype):
    net, images = net.to(dtype), images.to(dtype)
    sparse, stats = calibrated(net, images)
    msfx.set_alpha(sparse, 0.5)
    compiled = plug_in(net, statistics=stats, alpha=0.5)
    torch.testing.assert_close(compiled(images), sparse(images))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {m.std.dtype for m in compile_report(compiled).operators.values()} == {expected}


def test_placement(net, images):
    placement = msfx.Placement(exclude=("^relu$", "slope"))
    sparse, stats = calibrated(net, images, placement=placement)
    msfx.set_alpha(sparse, 0.3)
    compiled = plug_in(net, statistics=stats, alpha=0.3, placement=placement)
    torch.testing.assert_close(compiled(images), sparse(images))
    assert list(compile_report(compiled).operators) == ["relu_1", "gelu"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_models_inside_functions(net, images):
    sparse, stats = calibrated(net, images)
    msfx.set_alpha(sparse, 0.3)
    options = {"statistics": stats, "alpha": 0.3, "inner": "eager"}

    def predict(model, x):
        return model(x).softmax(-1)

    closed = torch.compile(lambda x: net(x).argmax(-1), backend="meansparse", options=options, fullgraph=True)

    def in_a_loop(x):
        for _ in range(2):  # which Python runs, so that the model's forward is a frame of its own
            y = net(x)
            torch._dynamo.graph_break()
        return y

    assert torch.equal(closed(images), sparse(images).argmax(-1))
    assert torch.equal(torch.compile(in_a_loop, backend="meansparse", options=options)(images), sparse(images))
    assert torch.equal(
        torch.compile(predict, backend="meansparse", options=options)(net, images), predict(sparse, images)
    )
    net.compile(backend="meansparse", options=options)
    assert torch.equal(net(images), sparse(images))
    report = compile_report(net)
    assert (len(report.graphs), len(report.operators)) == (3, 4)


OUTSIDE = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU()).eval()


class Unregistered(nn.Module):
    """Calls modules that are not among its children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.__dict__["acts"] = [nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU())]
        self.__dict__["named"] = {"registered": self.act}

    def forward(self, x):
        return self.named["registered"](OUTSIDE(self.acts[1](self.acts[0](self.conv(x)))))


def test_modules_that_the_model_does_not_register_have_the_names_of_where_they_are(images):
    model = Unregistered().eval()
    compiled = plug_in(model)
    assert torch.equal(compiled(images), model(images))
    plan = compile_report(compiled).plan
    assert [(s.name, s.channels, s.producer) for s in plan.active] == [
        ("acts.0.relu", 4, "conv"),
        ("acts.1.1.gelu", 4, "conv"),
        ("1.silu", 4, "conv"),
        ("act", 4, "silu"),
    ]


def test_torchs_activations_are_fused_as_by_transform(images):
    acts = (nn.ReLU6(), nn.GELU("tanh"), nn.Hardtanh(-2.0, 2.0), nn.Softplus(2.0), nn.Threshold(0.1, 0.0), nn.SELU())
    net = nn.Sequential(nn.Conv2d(3, 4, 1), *acts).eval()
    compiled = plug_in(net)
    compiled(images)
    plans = (compile_report(compiled).plan, msfx.inspect(net, images))
    mine, theirs = ([(s.name, s.activation.fused) for s in plan] for plan in plans)
    assert mine == theirs


SHIFT = torch.rand(4, 1, 1)


class Unseeing(nn.Module):
    """Activations of what is no parameter and no buffer, and does not depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), torch.rand(4, 1, 1)

    def forward(self, x):
        return F.gelu(self.conv(x) * F.silu(self.scale) + F.relu(SHIFT))


def test_tensors_that_the_model_holds_in_other_ways_are_no_inputs(images):
    compiled = plug_in(Unseeing().eval())
    compiled(images)
    plan = {s.name: s.refusal.kind if s.refusal else "" for s in compile_report(compiled).plan}
    assert plan == {"silu": "input-independent", "relu": "input-independent", "gelu": ""}


def test_sizes_that_vary_are_those_of_the_example(net, images):
    expected = [s.shape for s in msfx.inspect(net, images)]
    compiled, varying = plug_in(net), images.clone()
    for dim in (0, 2, 3):
        torch._dynamo.maybe_mark_dynamic(varying, dim)
    assert torch.equal(compiled(varying), net(images))
    assert [s.shape for s in compile_report(compiled).plan] == expected


class Squared(nn.Module):
    """An activation of one's own: a known one inside, and more around it."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x):
        return self.scale * self.relu(x) ** 2


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))


class Swish(nn.Module):
    def forward(self, x):
        return Gated.apply(x)


@pytest.mark.parametrize("grad", [False, True])
def test_activation_modules_that_are_traced_into_are_one_site(images, grad):
    for cls in (Squared, Swish):
        msfx.register_activation(cls, cls.__name__.lower())
    act = Swish()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Squared(), nn.Conv2d(4, 4, 1), act, nn.Conv2d(4, 4, 1), act, nn.GELU())
    _, stats = calibrated(net.eval(), images)
    expected = [(s.name, s.channels) for s in msfx.inspect(net, images)]
    assert expected == [("1", 4), ("3", 4), ("3_1", 4), ("6", 4)]
    with torch.set_grad_enabled(grad):
        sparse = msfx.transform(net, images, statistics=stats, alpha=0.3)
        compiled = plug_in(net, statistics=stats, alpha=0.3)
        assert torch.equal(compiled(images), sparse(images))
        assert [(s.name, s.channels) for s in compile_report(compiled).plan] == expected
    compile_report(compiled).set_alpha(0.0)
    assert torch.equal(compiled(images), net(images))


class Stepwise(nn.Module):
    """A Swish in two calls, as timm's; in place it overwrites its input with the second."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x, y=None):
        gate = torch.sigmoid(x if y is None else y)
        return x.mul_(gate) if self.inplace else x * gate


class Scaled(Stepwise):
    """One activation and more around it, in place as timm's GammaAct."""

    def forward(self, x, y=None):
        return F.silu(x, inplace=self.inplace) * 1.5


class Calling(nn.Module):
    """Calls one activation in the way it is told to, and has it under several paths."""

    def __init__(self, act, calls) -> None:
        super().__init__()
        self.left, self.right, self.act, self.calls = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), act, calls
        self.block, self.both = nn.Sequential(nn.Conv2d(4, 4, 1), act), nn.Sequential(act, act)
        self.slope, self.last = nn.Parameter(torch.rand(4, 1, 1)), nn.ReLU()
        self.own = Functional(lambda self, x: self.act(x), act=act)

    def forward(self, x):
        return self.last(self.calls(self, self.left(x), self.right(x)))


CALLS = {
    "on its own result": lambda net, a, b: net.act(net.act(a)) + b,
    "after both inputs": lambda net, a, b: net.act(a) + net.act(b),
    "on the same input": lambda net, a, b: net.act(a) + net.act(a) * b,
    "under one path": lambda net, a, b: net.both(a) + b,
    "in a module of one's own": lambda net, a, b: net.own(net.own(a)) + b,
    "in a block": lambda net, a, b: net.block(net.block(a)) + b,
    "on a parameter": lambda net, a, b: a * net.act(net.slope) + net.act(b),
}


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        pytest.param(make, calls, id=f"{name}, {how}")
        for name, make in {"steps": Stepwise, "weights": Squared, "in place": lambda: Scaled(inplace=True)}.items()
        for how, calls in CALLS.items()
        if name != "in place" or how not in ("on the same input", "on a parameter")  # which would be read again
    ],
)
def test_each_call_of_an_activation_module_is_a_site(images, make, calls):
    for cls in (Stepwise, Squared, Scaled):
        msfx.register_activation(cls, cls.__name__.lower())
    torch.manual_seed(0)
    net = Calling(make(), calls).eval()
    with torch.no_grad():
        sparse, stats = calibrated(net, images)
        msfx.set_alpha(sparse, 0.5)
        compiled = plug_in(net, statistics=stats, alpha=0.5)
        torch.testing.assert_close(compiled(images), sparse(images), rtol=1e-5, atol=1e-6)
        plan, expected = compile_report(compiled).plan, msfx.inspect(net, images)
        if not getattr(net.act, "inplace", False):  # of which the function inside is the site
            assert [s.activation.name for s in plan] == [s.activation.name for s in expected]
        plan = [(s.name, s.channels, s.skipped) for s in plan]
        assert plan == [(s.name, s.channels, s.skipped) for s in expected]
        assert [name for name, *_ in plan] == ["act", "act_1", "last"]
        compile_report(compiled).set_alpha(0.0)
        assert torch.equal(compiled(images), net(images))


@pytest.mark.parametrize(
    ("act", "calls", "names", "reason"),
    [
        (Stepwise(inplace=True), CALLS["after both inputs"], ("act", "act_1"), "in place: the activation overwrites"),
        (Stepwise(), lambda net, a, b: net.act(a, b), ("act",), "several inputs: 2 tensors enter the activation"),
    ],
    ids=["in place", "several inputs"],
)
def test_activation_module_that_cannot_be_rewritten_is_in_the_plan(images, act, calls, names, reason):
    msfx.register_activation(Stepwise, "stepwise")
    net = Calling(act, calls).eval()
    _, stats = calibrated(net, images)
    match = rf"StatisticsError: statistics have {len(names)} site.* act \({reason}"
    with torch.no_grad():
        refused(match, net, images, statistics=stats)
        torch.compiler.reset()
        compiled = plug_in(net, statistics=stats, allow_missing=True)
        assert torch.equal(compiled(images), net(images))
    skipped = {s.name: s.skipped for s in compile_report(compiled).plan}
    assert tuple(skipped) == (*names, "last")
    assert skipped.pop("last") is None
    assert all(words.startswith(reason) for words in skipped.values())


def test_transformed_model_is_only_lowered(net, images):
    sparse, _ = calibrated(net, images)
    msfx.set_alpha(sparse, 0.3)
    compiled = plug_in(sparse, inner="aot_eager")
    torch.testing.assert_close(compiled(images), sparse(images), rtol=1e-5, atol=1e-6)
    msfx.set_alpha(sparse, 0.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(images), net(images), rtol=1e-5, atol=1e-6)
    report = compile_report(compiled)
    assert report.transformed
    assert (report.missing, report.graphs, len(report.plan)) == ((), (), 0)
    with pytest.raises(StateError, match=r"transformed before it was compiled: give that model to msfx\.set_alpha"):
        report.set_alpha(0.1)
    with pytest.raises(BackendCompilerFailed, match="StateError: this model is transformed already"):
        plug_in(sparse, backward="identity")(images)


def test_sites_whose_names_differ_by_a_dot_have_bands_of_their_own(images):
    model = Functional(
        lambda self, x: self.a_1(self.conv(self.a(x))),
        a=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        conv=nn.Conv2d(4, 4, 3),
        a_1=nn.GELU(),
    ).eval()
    sparse, statistics = calibrated(model, images)
    assert list(statistics) == ["a.1", "a_1"]
    msfx.set_alpha(sparse, 0.5)
    torch.testing.assert_close(plug_in(model, statistics=statistics, alpha=0.5)(images), sparse(images))


# Graph breaks.

# Dynamo looks at a tensor's .grad where a graph begins, and torch warns of that.
breaks_graphs = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Block(nn.Module):
    def __init__(self, breaks: bool, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = act(inplace=True)
        self.breaks = breaks

    def forward(self, x):
        y = self.conv(x)
        if self.breaks:
            torch._dynamo.graph_break()
        z = self.act(y)  # overwrites y, which came from another graph
        if self.breaks:
            torch._dynamo.graph_break()
        return self.act(self.conv(y + x)) + z


class Broken(nn.Module):
    """Breaks in a submodule that is there twice, whose frames are compiled once for each."""

    def __init__(self, breaks: bool = True) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(breaks), Block(breaks))
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.conv(self.blocks(x)))


@breaks_graphs
def test_what_an_activation_of_no_kernel_overwrites_in_another_graph_is_overwritten(images):
    broken, whole = Block(True, nn.SELU).eval(), Block(False, nn.SELU).eval()
    whole.load_state_dict(broken.state_dict())
    sparse, stats = calibrated(whole, images)
    msfx.set_alpha(sparse, 0.4)
    compiled = plug_in(broken, fullgraph=False, statistics=stats, alpha=0.4)
    for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.fixture
def broken(images):
    torch.manual_seed(0)
    broken, whole = Broken().eval(), Broken(breaks=False).eval()
    whole.load_state_dict(broken.state_dict())
    return broken, *calibrated(whole, images)


@breaks_graphs
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_graph_breaks_are_survived(broken, images, inner):
    model, sparse, stats = broken
    msfx.set_alpha(sparse, 0.4)
    compiled = plug_in(model, fullgraph=False, statistics=stats, alpha=0.4, inner=inner)
    for batch in (images[:3], images):
        for own, expected in zip(gradients(compiled, batch), gradients(sparse, batch), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    report = compile_report(compiled)
    assert set(report.operators) == set(msfx.operators(sparse)) == set(stats)
    assert "blocks.1.act_1" in stats
    assert len(report.graphs) > 3
    assert report.missing == ()
    assert "blocks.1.act_1" in str(report)
    with torch.compiler.set_stance("fail_on_recompile"):
        report.set_alpha(0.1)
        msfx.set_alpha(sparse, 0.1)
        for own, expected in zip(gradients(compiled, images), gradients(sparse, images), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


class Part(nn.Module):
    """Calls modules and functions on both sides of a break."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()

    def forward(self, x):
        x = F.relu(self.conv(x))
        torch._dynamo.graph_break()
        return F.gelu(self.act(self.norm(x)))


@breaks_graphs
def test_graphs_of_parts_name_their_sites_from_the_whole_model(images):
    parts = nn.Sequential(Part(), Part())
    children = {"parts": parts, "last": nn.ReLU(), "again": parts[1].act}
    model = Functional(lambda self, x: self.again(self.last(self.parts(x))), **children).eval()
    compiled = plug_in(model, fullgraph=False)
    assert torch.equal(compiled(images), model(images))
    assert [(s.name, s.channel_dim, s.producer) for s in compile_report(compiled).plan.active] == [
        *(
            (f"parts.{k}.{name}", 1, after)
            for k in (0, 1)
            for name, after in (("relu", "conv"), ("act", "batch_norm"), ("gelu", "silu"))
        ),
        ("last", 1, "input"),
        ("parts.1.act_1", 1, "relu"),
    ]


@breaks_graphs
def test_site_without_a_graph_is_known_at_the_last_graph(broken, images):
    model, _, stats = broken
    more = msfx.Statistics(stats.sites | {"nope": stats["act"]}, stats.fingerprint, stats.images)
    with pytest.raises(BackendCompilerFailed, match=r"StatisticsError: .* 1 site\(s\) .* nope \(no such call\)"):
        plug_in(model, fullgraph=False, statistics=more, alpha=0.1)(images)
    torch.compiler.reset()
    compiled = plug_in(model, fullgraph=False, statistics=more, alpha=0.1, allow_missing=True)
    compiled(images)
    assert compile_report(compiled).missing == ("nope",)


class Interrupted(nn.Module):
    """Something between a convolution and its activation that Dynamo does not follow."""

    def __init__(self, between, functional: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.GELU()
        self.between, self.functional = between, functional

    def forward(self, x):
        act = F.gelu if self.functional else self.act
        x = self.conv(x)
        x = self.between(x)
        return act(x)


def pause(x):
    torch._dynamo.graph_break()
    return x


@pytest.mark.slow
@breaks_graphs
def test_blocks_built_alike_keep_their_own_operators(images):
    """Dynamo would run the first block's code for all of them: their parameters are inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(True) for _ in range(12))).eval()  # more than recompile_limit
    whole = copy.deepcopy(net)
    for block in whole:
        block.breaks = False
    with torch.no_grad():
        sparse, stats = calibrated(whole, images)
        msfx.set_alpha(sparse, 0.4)
        compiled = plug_in(net, fullgraph=False, statistics=stats, alpha=0.4)
        for batch in (images[:3], images):
            torch.testing.assert_close(compiled(batch), sparse(batch), rtol=1e-4, atol=1e-5)
    assert compile_report(compiled).operators.keys() == msfx.operators(sparse).keys()


def test_models_built_alike_keep_their_own_observers(images):
    nets = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval() for _ in range(2)]
    compiled = [plug_in(net, observe=True) for net in nets]
    for model in compiled:
        model(images)
    for net, model in zip(nets, compiled, strict=True):
        _, expected = calibrated(net, images)
        torch.testing.assert_close(compile_report(model).statistics()["1"].mean, expected["1"].mean)


class Paused(nn.Module):
    """A Swish that breaks the graph before, between or after its two calls."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x):
        if self.place == 0:
            torch._dynamo.graph_break()
        gate = torch.sigmoid(x)
        if self.place == 1:
            torch._dynamo.graph_break()
        x = x * gate
        if self.place == 2:
            torch._dynamo.graph_break()
        return x


@breaks_graphs
@pytest.mark.parametrize("place", [0, 1, 2])
def test_activation_module_that_breaks_the_graph_is_in_the_plan(images, place):
    msfx.register_activation(Paused, "paused")
    net = Interrupted(Paused(place)).eval()
    with torch.no_grad():
        compiled = plug_in(net, fullgraph=False, observe=True)
        assert torch.equal(compiled(images), net(images))
    plan = {s.name: s.skipped for s in compile_report(compiled).plan}
    assert plan.pop("act") is None
    assert "between" in plan
    assert all(reason.startswith("graph break: this graph has only a part") for reason in plan.values())


class Looped(nn.Module):
    """Breaks in a loop, whose frame Dynamo then leaves: the activation's forward is a frame of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.acts, self.last = nn.ModuleList([Stepwise(), Stepwise()]), nn.ReLU()

    def forward(self, x):
        for act in self.acts:
            x = act(x)
            torch._dynamo.graph_break()
        return self.last(x)


@breaks_graphs
def test_activation_module_that_is_a_frame_of_its_own_is_a_site(images):
    msfx.register_activation(Stepwise, "stepwise")
    net = Looped().eval()
    placement = msfx.Placement(channel_dims={"acts.0": 1, "acts.1": 1}, exclude=("last",))
    with torch.no_grad():
        with pytest.raises(BackendCompilerFailed, match=rf"Dynamo leaves forward \({__file__}:\d+\) to Python"):
            plug_in(net, fullgraph=False, observe=True, placement=placement)(images)
        torch.compiler.reset()
        compiled = plug_in(net, fullgraph=False, observe=True, placement=placement, allow_missing=True)
        assert torch.equal(compiled(images), net(images))
    stats = compile_report(compiled).statistics()
    expected = {"acts.0": images, "acts.1": net.acts[0](images)}
    assert stats.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(stats[name].mean, x.double().mean((0, 2, 3)), check_dtype=False)


class Around(nn.Module):
    """Sites around a part that breaks the graph: nn.Sequential is then left to Python, and what it calls itself."""

    def __init__(self, around) -> None:
        super().__init__()
        self.block, self.around = Block(True), around
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), self.block, nn.Conv2d(3, 3, 1), nn.SiLU())

    def forward(self, x):
        return self.around(self, x)


@breaks_graphs
@pytest.mark.parametrize("options", [{}, {"observe": True}])
def test_activations_that_python_calls_are_not_left_out_silently(images, options):
    net = Around(lambda self, x: self.stem(x)).eval()
    with pytest.raises(BackendCompilerFailed, match=r"SiteError: Dynamo leaves stem.forward \(.*container.py"):
        plug_in(net, fullgraph=False, **options)(images)


@breaks_graphs
@pytest.mark.parametrize("options", [{}, {"observe": True}])
def test_two_calls_of_one_frame_are_no_single_site(images, options):
    """Dynamo compiles a frame once, however often it is called; alone, it is called once in each forward."""
    net = Around(lambda self, x: self.block(x)).eval()
    compiled = plug_in(net, fullgraph=False, **options)
    for _ in range(3):
        assert torch.equal(compiled(images), net(images))
    torch.compiler.reset()
    net = Around(lambda self, x: self.block(self.block(x))).eval()
    compiled = plug_in(net, fullgraph=False, **options)
    for _ in range(2):
        with pytest.raises(SiteError, match=r"block\.act.*one code for several calls.*take what transform"):
            compiled(images)


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        return self.activated(self.act(self.conv(x)))

    @torch.compiler.disable
    def activated(self, x):
        return F.gelu(self.conv(x))


@breaks_graphs
def test_statistics_without_a_graph_are_known_without_a_last_graph(images):
    """The last graph would check that, and behind the break there is none."""
    net = Disabled().eval()
    _, stats = calibrated(net, images)
    compiled = plug_in(net, fullgraph=False, statistics=stats, alpha=0.1)
    compiled(images)
    with pytest.raises(StatisticsError, match=r"1 site\(s\) that none of the 1 graph\(s\) has: gelu \(no such call\)"):
        compiled(images)


@breaks_graphs
def test_disabled_activations_are_not_left_out_of_what_is_observed(images):
    net = Disabled().eval()
    line = re.escape("return self.activated(self.act(self.conv(x)))")
    with pytest.raises(BackendCompilerFailed, match=rf"Dynamo leaves what torch.compiler.disable wraps in `{line}`"):
        plug_in(net, fullgraph=False, observe=True)(images)
    torch.compiler.reset()
    compiled = plug_in(net, fullgraph=False, observe=True, allow_missing=True)
    compiled(images)
    assert list(compile_report(compiled).statistics()) == ["act"]


@breaks_graphs
def test_channel_axis_is_carried_from_graph_to_graph(images):
    net = Interrupted(pause).eval()
    compiled = plug_in(net, fullgraph=False)
    assert torch.equal(compiled(images), net(images))
    assert [(s.name, s.channel_dim, s.producer) for s in compile_report(compiled).plan] == [("act", 1, "input")]


@breaks_graphs
def test_site_whose_module_is_unknown_after_a_break(images):
    """Without ``self`` in the frame nothing keeps Dynamo from sharing it among modules."""
    net = Interrupted(pause, functional=True).eval()
    with pytest.raises(BackendCompilerFailed, match=r"SiteError: none of the 1 candidate.*nameless"):
        plug_in(net, fullgraph=False)(images)


@breaks_graphs
def test_graph_breaks_where_the_axis_gets_lost(images):
    net = Interrupted(torch._dynamo.disable(lambda x: x + 0)).eval()
    placement = msfx.Placement(channel_dims={"act": 1})
    with pytest.raises(BackendCompilerFailed, match=r"SiteError: none of the 1 candidate .* channel axis unknown"):
        plug_in(net, fullgraph=False)(images)
    torch.compiler.reset()
    compiled = plug_in(net, fullgraph=False, placement=placement)
    assert torch.equal(compiled(images), net(images))
    assert list(compile_report(compiled).operators) == ["act"]


# Observing.


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_observed_statistics_are_those_of_calibrate(net, images, inner):
    sparse, expected = calibrated(net, images)
    compiled = plug_in(net, observe=True, inner=inner)
    for batch in images.split(5):
        torch.testing.assert_close(compiled(batch), net(batch), rtol=1e-5, atol=1e-6)
    stats = compile_report(compiled).statistics(images=len(images), metadata={"data": "noise"})
    assert (stats.images, stats.fingerprint, stats.metadata["data"]) == (12, expected.fingerprint, "noise")
    for name, own in stats.items():
        assert own.count == expected[name].count
        torch.testing.assert_close(own.mean, expected[name].mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.std, expected[name].std, rtol=1e-5, atol=1e-6)
    msfx.set_statistics(sparse, stats)


@pytest.mark.slow
def test_observers_keep_nothing_in_memory_that_the_model_does_not(images):
    def allocations(**options):
        torch.compiler.reset()
        net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(), nn.Conv2d(32, 4, 3)).eval()
        with torch.inference_mode():
            _, code = run_and_get_code(torch.compile(net, **options), images)
        return len(re.findall(r"empty_strided\w*\(\(12, 32, ", "".join(code)))

    plain = allocations()
    kept = {"inner": "inductor", "inner_options": {"realize_reads_threshold": 4}}  # Inductor's own
    assert allocations(backend="meansparse", options={"observe": True, "inner": "inductor"}) == plain
    assert allocations(backend="meansparse", options={"observe": True, **kept}) == plain + 1


@breaks_graphs
def test_model_that_cannot_be_traced_is_observed_and_rewritten(broken, images):
    model = broken[0]
    compiled = plug_in(model, fullgraph=False, observe=True)
    compiled(images)
    stats = compile_report(compiled).statistics()
    assert set(stats) == set(broken[2])
    sparse = plug_in(model, fullgraph=False, statistics=stats, alpha=0.5)
    assert not torch.equal(sparse(images), model(images))
    assert len(compile_report(sparse, {"statistics": stats, "alpha": 0.5, "inner": "eager"}).operators) == 5


def test_observing_refuses_nan(net, images):
    compiled = plug_in(net, observe=True)
    compiled(images * torch.nan)
    with pytest.raises(CalibrationError, match="relu: no values, NaN or inf"):
        compile_report(compiled).statistics()


# Bad input.


def refused(match, model, images, **options):
    with pytest.raises(BackendCompilerFailed, match=match):
        plug_in(model, **options)(images)


def test_options_that_do_not_exist(net, images):
    refused(
        "StateError: the meansparse back end has no option 'alhpa'; it knows statistics, alpha", net, images, alhpa=1
    )
    refused("StateError: option inner is 'nope', which is no inner back end", net, images, inner="nope")
    refused("StateError: option inner is 'meansparse'", net, images, inner="meansparse")
    refused("StateError: mode='max-autotune' is for Inductor", net, images, mode="max-autotune")
    refused("StateError: torch.compile has no mode 'fast'", net, images, mode="fast", inner="inductor")
    refused("StateError: Inductor has no option 'a'", net, images, inner="inductor", inner_options={"a": 1})
    refused("backward must be one of exact", net, images, backward="nope")


def test_alpha_without_statistics(net, images):
    refused("StateError: option alpha is 0.2, but there are no statistics: .*calibrate", net, images, alpha=0.2)
    refused("StateError: option observe measures the base model", net, images, alpha=0.2, observe=True)
    for nothing in ("0", {"relu": "0.0"}):
        assert torch.equal(plug_in(net, alpha=nothing)(images), net(images))


@pytest.mark.parametrize("alpha", ["1/4", {"relu|gelu": "0.25", "slope": torch.tensor(0.25)}])
def test_alpha_in_every_form_that_set_alpha_takes(net, images, alpha):
    _, stats = calibrated(net, images)
    compiled = plug_in(net, statistics=stats, alpha=alpha)
    compiled(images)
    assert {o.get_alpha() for o in compile_report(compiled).operators.values()} == {0.25}
    assert str(compile_report(compiled)).endswith("\nalpha: 0.25")


class Routed(nn.Module):
    """Two ways, of which each call takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.GELU(), nn.SiLU()
        self.to_left = True

    def forward(self, x):
        x = self.stem(self.conv(x))
        return self.left(x) if self.to_left else self.right(x)


def test_alpha_set_by_site_leaves_that_of_sites_yet_to_be_compiled(images):
    model, sites = Routed().eval(), {}
    for model.to_left in (False, True):
        _, stats = calibrated(model, images)
        sites |= stats.sites
    both = msfx.Statistics(sites, stats.fingerprint, stats.images)
    compiled = plug_in(model, statistics=both, alpha={"": 0.2}, allow_missing=True)
    compiled(images)
    report = compile_report(compiled)
    report.set_alpha({"stem": 0.1})
    model.to_left = False
    compiled(images)
    assert {name: o.get_alpha() for name, o in report.operators.items()} == {"stem": 0.1, "left": 0.2, "right": 0.2}
    with pytest.raises(StateError, match="no such site: nope; sites are left, right, stem"):
        report.set_alpha({"nope": 0.1})


def test_train_mode(net, images):
    refused(r"StateError: the model is in train mode \(bn\)", (net.bn.train(), net)[1], images)


def test_statistics_that_do_not_fit(net, images):
    _, stats = calibrated(net, images)
    fewer = msfx.Statistics({n: s for n, s in stats.items() if n != "gelu"}, stats.fingerprint, 1)
    refused(r"StatisticsError: statistics lack 1 site\(s\) of the model: gelu", net, images, statistics=fewer)
    swapped = msfx.Statistics(stats.sites | {"gelu": stats["relu"]}, stats.fingerprint, 1)
    refused("StatisticsError: gelu: statistics of 8 channels for a site of 6", net, images, statistics=swapped)
    refused("StateError: option alpha names 'nope'", net, images, statistics=stats, alpha={"nope": 0.1})
    refused("alpha must be finite and not negative", net, images, statistics=stats, alpha=-0.1)
    placement = msfx.Placement(channel_dims={"nope": 1})
    refused("SiteError: placement gives channel_dims for 'nope'", net, images, placement=placement)
    compiled = plug_in(net, statistics=fewer, alpha=0.2, allow_missing=True)
    compiled(images)
    report = compile_report(compiled, {"statistics": fewer, "alpha": 0.2, "allow_missing": True, "inner": "eager"})
    assert [s.skipped for s in report.plan if s.skipped] == ["missing: not in the statistics"]
    with torch.no_grad():
        net.head.bias[0] += 1
    refused("StatisticsError: .*other weights", net, images, statistics=stats)
    plug_in(net, statistics=stats, check_weights=False)(images)


def test_function_without_a_module_has_no_names(images):
    weight = torch.rand(4, 3, 3, 3)
    compiled = torch.compile(lambda x: F.gelu(F.conv2d(x, weight)), backend="meansparse", options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed, match="SiteError: gelu: found outside of any module"):
        compiled(images)


def test_graph_without_a_site(images):
    refused("SiteError: no activation is in what Dynamo captured", nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), images)


def test_report_needs_a_compiled_model_and_one_set_of_options(net, images):
    with pytest.raises(StateError, match="call the compiled model once"):
        compile_report(net)
    _, stats = calibrated(net, images)
    both = [plug_in(net, statistics=stats, alpha=alpha) for alpha in (0.1, 0.9)]
    outputs = [compiled(images) for compiled in both]
    assert not torch.equal(*outputs)
    with pytest.raises(StateError, match="several options"):
        compile_report(both[0])
    options = {"statistics": stats, "alpha": 0.9, "inner": "eager"}
    compile_report(both[1], options).set_alpha(0.1)
    assert torch.equal(both[1](images), outputs[0])
    torch.compiler.reset()
    with pytest.raises(StateError, match="call the compiled model once"):
        compile_report(net)


def test_found_by_name_without_an_import():
    code = """
import torch
net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).eval()
x = torch.rand(2, 1, 8, 8)
print(torch.equal(torch.compile(net, backend="meansparse", options={"inner": "eager"})(x), net(x)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_nothing_is_known_of_what_was_not_observed(net, images):
    compiled = plug_in(net)
    compiled(images)
    with pytest.raises(CalibrationError, match=r"nothing was observed: compile with options=\{'observe': True\}"):
        compile_report(compiled).statistics()
    observed = plug_in(net, observe=True)
    observed(images)
    with pytest.raises(StateError, match="option observe measures the base model, which has no alpha"):
        compile_report(observed, {"observe": True, "inner": "eager"}).set_alpha(0.1)
