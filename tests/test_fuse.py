"""Fusion of norms and sums into the operator: the same function, fewer calls, and everything undone by restore."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

import meansparse_fx as msfx
from meansparse_fx.errors import StateError
from meansparse_fx.frozen import FrozenNorm, Prologue
from meansparse_fx.nn import MeanSparse
from meansparse_fx.sites.ops import Operators
from tests.models import Functional
from tests.test_published import Published

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class PostActivation(nn.Module):
    """As ResNets: convolution, norm, sum, activation."""

    placement, kept = None, 0.9  # and the bytes kept for backward over those without fusion

    def __init__(self):
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn0(self.conv0(x)))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out).mean((2, 3))


class PreActivation(nn.Module):
    """As WideResNets: norm, activation, convolution; the sum is read by the norm and by the next sum."""

    placement, kept = None, 0.9

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.slope = nn.PReLU(6)

    def forward(self, x):
        x = self.conv(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.add(x, conv(F.silu(norm(x))))
        return self.slope(self.norms[3](x)).mean((2, 3))


class LayerScaled(nn.Module):
    """As ConvNeXts: a branch that ends in a LayerScale, before or behind a permute, and an operator before the sum."""

    placement, kept = "robustbench:convnext", 1.0

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.up, self.down = (nn.ModuleList(nn.Linear(*n) for _ in range(3)) for n in ((6, 12), (12, 6)))
        self.gammas = nn.ParameterList(nn.Parameter(torch.randn(6)) for _ in range(2))
        self.drop = nn.Dropout(0.5)

    def branch(self, x, i):
        y = self.norms[i](self.convs[i](x)).permute(0, 2, 3, 1)
        return self.down[i](F.gelu(self.up[i](y)))  # [N, H, W, C]

    def forward(self, x):
        x = self.stem(x)
        x = x + self.drop((self.gammas[0] * self.branch(x, 0)).permute(0, 3, 1, 2))
        x = self.drop(self.branch(x, 1).permute(0, 3, 1, 2).mul(self.gammas[1].reshape(1, -1, 1, 1))) + x
        x = x + self.branch(x, 2).permute(0, 3, 1, 2)
        return x.mean((2, 3))


def build(architecture):
    torch.manual_seed(0)
    model = architecture()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(params=[PostActivation, PreActivation, LayerScaled])
def model(request):
    return build(request.param)


@pytest.fixture
def images():
    return IMAGES.double()


def calibrated(model, images, **options):
    sparse = msfx.transform(model, images, placement=getattr(model, "placement", None), **options)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.4)
    return sparse


def test_what_is_fused(images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # of the terminal that the plan is printed on
    fused = msfx.transform(build(PostActivation), images, fuse="all")
    assert {s.name: s.fused for s in fused.meta["plan"]} == {
        "relu": "norm",
        "relu_1": "norm",
        "relu_2": "norm + sum",
    }
    calls = [n.target for n in fused.graph.nodes if n.op in ("call_module", "call_function")]
    assert calls == ["conv0", "meansparse.relu", "conv1", "meansparse.relu_1", "conv2", "meansparse.relu_2"]
    fused = msfx.transform(build(PreActivation), images, fuse="all")
    assert [s.fused for s in fused.meta["plan"]] == ["norm", *["sum + norm, both results read"] * 2, "sum + norm"]
    assert "rewritten; fused: sum + norm" in str(fused.meta["plan"])
    functions = [n.target for n in fused.graph.nodes if n.op == "call_function"]
    assert set(functions) == {operator.getitem}


def test_what_is_fused_at_the_end_of_a_branch(images):
    fused = msfx.transform(build(LayerScaled), images, fuse="all", placement="robustbench:convnext")
    assert [(s.kind, s.fused) for s in fused.meta["plan"] if not s.skipped] == [
        ("activation", "nothing beside it to take in"),
        ("residual_branch", "LayerScale, sum after it"),
        ("activation", "nothing beside it to take in"),
        ("residual_branch", "LayerScale, sum after it"),
        ("activation", "nothing beside it to take in"),
        ("residual_branch", "sum after it"),
    ]
    methods = [n.target for n in fused.graph.nodes if n.op in ("call_method", "call_function")]
    assert set(methods) == {"permute", "mean"}
    assert sum(str(n.target).startswith("meansparse.") for n in fused.graph.find_nodes(op="call_module")) == 6
    calls = [n for n in fused.graph.nodes if n.kwargs.get("fused")]
    assert [sorted(n.kwargs) for n in calls] == [["fused", "layer_scale", "shortcut"]] * 2 + [["fused", "shortcut"]]


def branches(branch):
    """Return the plan's word for one operator at the end of a branch of x ``[N, 6, 8, 8]``, and both outputs."""
    model = Functional(lambda m, x: branch(m, m.conv(x)), conv=nn.Conv2d(3, 6, 1))
    model.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 6).view(6, 1, 1))
    model.eval().requires_grad_(False)
    placement = msfx.Placement(kinds=("residual_branch",))
    images = IMAGES
    results = []
    for fuse in ("activation", "all"):
        sparse = msfx.transform(model, images, placement=placement, fuse=fuse)
        msfx.calibrate(sparse, [images], progress=False)
        msfx.set_alpha(sparse, 0.5)
        results.append(sparse(images))
    (site,) = (s for s in sparse.meta["plan"] if s.skipped is None)
    return site.fused, *results


def seven(x):
    return torch.tanh(x) * 7


SCALED = "LayerScale, sum after it"
BRANCHES = {
    "gamma first": (lambda m, x: x + m.gamma * seven(x), SCALED),
    "in place": (lambda m, x: x + seven(x).mul_(m.gamma), SCALED),
    "the sum in place": (lambda m, x: (seven(x) * m.gamma).add_(x), SCALED),
    "gamma is indexed": (lambda m, x: x + seven(x) * m.gamma.flatten()[:, None, None], "sum after it"),
    "moved by keyword": (lambda m, x: x + torch.permute(input=seven(x) * m.gamma, dims=(0, 1, 2, 3)), "sum after it"),
    "rows are scaled": (
        lambda m, x: x[:, :, :6] + seven(x[:, :, :6]) * m.gamma.view(6, 1),
        "sum after it; what it is multiplied by is not one number for each of its channels",
    ),
    "the product is read twice": (
        lambda m, x: (lambda y: (x + y) * y.mean())(seven(x) * m.gamma),
        "sum after it; others read the LayerScale's result, too",
    ),
    "what gamma scales changes": (
        lambda m, x: (lambda y: (lambda z: (y.add_(1), x + z)[1])(y * m.gamma))(seven(x)),
        "sum after it; a value around the LayerScale is overwritten",
    ),
    "the product is read as what it scaled": (
        lambda m, x: (lambda y: (lambda z: (x + z) * y)(y.mul_(m.gamma)))(seven(x)),
        "sum after it; a value around the LayerScale is overwritten",
    ),
    "gamma changes, and back": (
        lambda m, x: (lambda z: (m.gamma.neg_(), x + z, m.gamma.neg_())[1])(seven(x) * m.gamma.view(1, 6, 1, 1)),
        "sum after it; a value around the LayerScale is overwritten",
    ),
    "the shortcut changes": (
        lambda m, x: (lambda s: (lambda t: (s.mul_(2), t)[1])(s + seven(s) * m.gamma))(x * 1),
        "LayerScale; what the sum after it reads is overwritten",
    ),
    "the sum is read as its operand": (
        lambda m, x: (lambda s: (lambda t: t * s)(s.add_(seven(s) * m.gamma)))(x * 1),
        "LayerScale; what the sum after it reads is overwritten",
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_and_what_declines_them(name):
    branch, expected = BRANCHES[name]
    said, plain, fused = branches(branch)
    assert said == expected
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_of_mixed_dtypes_the_result_is_torchs(images):
    """As under autocast: a half precision branch added to a float32 shortcut, LayerScale in float32."""
    model = build(LayerScaled).float()
    sparse = calibrated(model, IMAGES, fuse="all")
    plain = calibrated(model, IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, expected = sparse(IMAGES), plain(IMAGES)
    assert own.dtype == expected.dtype
    # A value beside the band's edge may fall on its other side where the product is not rounded.
    torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-2)


def test_the_same_function_and_gradients(model, images):
    plain, fused = calibrated(model, images), calibrated(model, images, fuse="all")
    results = []
    for sparse in (plain, fused, model):
        x = images.clone().requires_grad_()
        y = sparse(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    # float64, and scale and shift are computed in another order.
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(results[1][0], results[2][0])


def test_other_modes_and_variants(model, images):
    plain, fused = calibrated(model, images), calibrated(model, images, fuse="all")
    for backward, variant in (("identity", "mean"), ("smooth", "mean"), ("exact", "edge"), ("exact", "smooth")):
        grads = []
        for sparse in (plain, fused):
            msfx.set_variant(sparse, variant)
            msfx.set_backward(sparse, backward)
            x = images.clone().requires_grad_()
            sparse(x).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


def test_restore_calibrate_and_state(model, images):
    plain, fused = calibrated(model, images), calibrated(model, images, fuse="all")
    assert torch.equal(msfx.restore(fused)(images), model(images))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    own = {n: (m.mean, m.std) for n, m in msfx.operators(fused).items()}
    for name, operator_ in msfx.operators(plain).items():
        assert torch.equal(own[name][0], operator_.mean)
        assert torch.equal(own[name][1], operator_.std)


def test_new_weights_count(model, images):
    fused = calibrated(model, images, fuse="all")
    fused(images)
    other = copy.deepcopy(fused.state_dict())
    for key, value in other.items():
        if key.endswith("running_var") or "gammas" in key:
            value.mul_(2)
    fused.load_state_dict(other)
    plain = calibrated(model, images)
    plain.load_state_dict(other)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "write", [lambda t: t.data.mul_(2), lambda t: t.numpy().__imul__(2), lambda t: t.mul_(2)], ids=["data", "numpy", ""]
)
def test_a_norm_that_is_written_to_counts(model, images, write):
    """By whatever way: the version that autograd counts is the same after ``.data.mul_`` and through NumPy."""
    fused, plain = calibrated(model, images, fuse="all"), calibrated(model, images)
    fused(images)
    for own in (fused, plain):
        for key, buffer in own.named_buffers():
            if key.endswith("running_var"):
                write(buffer)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-9, atol=1e-11)


def test_elsewhere_than_on_a_cpu_kernels_read_the_parameters_themselves():
    norm = nn.BatchNorm2d(3, device="meta").eval().requires_grad_(False)
    own = MeanSparse("site", 3, 1).to("meta")
    own.prologue = Prologue(FrozenNorm(norm))
    bound = own._operator(None, True, None)
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    assert all(read is held for read, held in zip(bound.vectors.input_norm, state, strict=True))
    assert own._operator(None, True, None) is bound
    weight = norm.weight
    norm.half()
    assert norm.weight is weight
    assert own._operator(None, True, None) is not bound, "which was bound to float32"


def derivatives(sparse, images):
    """Return the gradient by the images, and that of its square's sum."""
    leaf = images.clone().requires_grad_()
    (first,) = torch.autograd.grad(sparse(leaf).square().sum(), leaf, create_graph=True)
    return first.detach(), *torch.autograd.grad(first.square().sum(), leaf)


def test_gradients_behind_a_first_call_in_inference_mode(model, images):
    fused, plain = calibrated(model, images, fuse="all"), calibrated(model, images)
    for own in (fused, plain):
        for norm in norms(own):
            norm.running_var.mul_(2)  # calibrate called them, too
    with torch.inference_mode():
        fused(images)
    for found, expected in zip(derivatives(fused, images), derivatives(plain, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def norms(sparse):
    return [m for m in sparse.modules() if isinstance(m, nn.BatchNorm2d)]


def test_another_eps_counts(model, images):
    fused, plain = calibrated(model, images, fuse="all"), calibrated(model, images)
    before = fused(images)
    for norm in (*norms(fused), *norms(plain)):
        norm.eps = 0.5
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-9, atol=1e-11)
    assert bool((fused(images) == before).all()) == (not norms(fused))


def test_weights_of_norms_under_torch_func(model, images):
    fused, plain = calibrated(model, images, fuse="all"), calibrated(model, images)
    factors, results = torch.tensor([1.0, 1.5], dtype=torch.float64), []
    for sparse in (fused, plain):
        sparse(images)
        state = {k: factors.view(2, *[1] * v.dim()) * v for k, v in sparse.named_parameters()}
        state |= {k: factors.view(2, *[1] * v.dim()) * v for k, v in sparse.named_buffers() if "running" in k}
        call = torch.func.vmap(lambda s, sparse=sparse: torch.func.functional_call(sparse, s, (images,)))
        results.append(call(state))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[0][0], fused(images), rtol=1e-9, atol=1e-11)


def test_gradients_wanted_later_are_refused(model, images):
    """They would be none, or zero under torch.func, without a word."""
    fused = calibrated(model, images, fuse="all").requires_grad_(True)
    with pytest.raises(StateError, match=r"(norm|LayerScale) fused into it want gradients now.*requires_grad_"):
        fused(images)
    with torch.no_grad():
        assert torch.equal(fused(images), fused.requires_grad_(False)(images))


def test_torch_jit_traces_the_norms_themselves(images):
    fused = calibrated(build(PostActivation), images, fuse="all")
    fused(images)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")  # on its way out: a warning whose kind depends on torch
        traced = torch.jit.trace(fused, images)
        with pytest.raises(StateError, match=r"torch.jit.script cannot .* torch.jit.trace"):
            torch.jit.script(fused)
    for norm in norms(fused):
        norm.running_var.mul_(2)
    assert torch.equal(traced(images), fused(images))


def test_a_norm_without_statistics_is_refused(images):
    fused = calibrated(build(PostActivation), images, fuse="all")
    fused.bn0.running_var = None
    with pytest.raises(StateError, match=r"relu: fused with a batch norm .* lost its statistics"):
        fused(images)


def test_a_layer_scale_in_new_memory_counts(images):
    model = build(LayerScaled)
    fused, plain = calibrated(model, images, fuse="all"), calibrated(model, images)
    fused(images)
    for sparse in (fused, plain):
        gamma = sparse.get_parameter("gammas.0")
        gamma.data = gamma.data * 2
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-9, atol=1e-11)


class Written(nn.Module):
    """A norm, a LayerScale that is reshaped, and a sum, called by a function of theirs."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.call = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), call
        self.gamma, self.act, self.last = nn.Parameter(torch.rand(6, 1, 1)), nn.ReLU(), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        h = self.conv(x)
        return self.last(self.act(self.call(self, h)))


def normed(self, h):
    norm = self.norm
    return {"input": h, "running_mean": norm.running_mean, "running_var": norm.running_var, "weight": norm.weight}


BY_KEYWORD = {
    "reshape": lambda self, h: h + torch.reshape(input=self.gamma * h.sin(), shape=h.shape),
    "mul": lambda self, h: h + torch.mul(input=h.sin(), other=self.gamma),
    "add": lambda self, h: torch.add(input=h, other=self.gamma * h.sin()),
    "batch_norm": lambda self, h: F.batch_norm(**normed(self, h)),
    "module": lambda self, h: self.norm(input=h),
}


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_calls_by_keyword_are_fused_or_left_alone(name, images):
    model = Written(BY_KEYWORD[name]).double().eval().requires_grad_(False)
    model.norm.running_mean.normal_()
    fused, plain = calibrated(model, images, fuse="all"), calibrated(model, images)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-9, atol=1e-11)


def test_copies_and_pickles(model, images):
    fused = calibrated(model, images, fuse="all")
    expected = fused(images)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(images), expected)
        assert torch.equal(msfx.restore(copied)(images), model(images))
        for module in copied.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(1)
        assert not torch.equal(copied(images), expected)
        assert torch.equal(fused(images), expected)


def test_under_torch_compile(model, images):
    fused = calibrated(model, images, fuse="all")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), fused(images), rtol=1e-9, atol=1e-11)


def test_less_is_kept_for_backward(model, images):
    kept = []
    for options in ({}, {"fuse": "all"}):
        sparse = calibrated(model, images, **options)
        seen = {}

        def keep(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = sparse(images.clone().requires_grad_())
        kept.append(sum(seen.values()))
        del y
    assert kept[1] <= model.kept * kept[0]


def test_gradients_wanted_for_a_norm_decline_it(model, images):
    model.requires_grad_(True)
    fused = calibrated(model, images, fuse="all")
    assert {s.fused for s in fused.meta["plan"]} <= {
        "the norm's parameters want gradients: model.requires_grad_(False)",
        "sum",  # its norm has no parameters, or stays outside
        "norm + sum",
        "nothing beside it to take in",
        "sum after it",
        "sum after it; the LayerScale's parameter wants gradients: model.requires_grad_(False)",
    }
    torch.testing.assert_close(fused(images), calibrated(model, images)(images), rtol=1e-9, atol=1e-11)


def test_train_mode_is_refused(images):
    fused = calibrated(build(PostActivation), images, fuse="all")
    fused.train()
    with pytest.raises(StateError, match="relu: fused with a batch norm in eval mode"):
        fused(images)


def test_an_unknown_fusion_is_refused(model, images):
    with pytest.raises(StateError, match="fuse must be one of activation, all, got 'norm'"):
        msfx.transform(model, images, fuse="norm")


def test_what_others_read_or_overwrite_stays(images):
    """A norm that two read, a sum that broadcasts, and an operand that is overwritten later are left alone."""

    class Hazards(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.bn(self.conv(x))
            a = F.relu(y) + y  # two readers of the norm
            b = F.gelu(a + self.conv.weight[0, :, :1, :1])  # a broadcast sum
            c = self.conv(b)
            d = F.silu(c + b)
            c.mul_(2)  # after the sum, and before anything fused might read it
            return d + c

    model = build(Hazards)
    plain, fused = calibrated(model, images), calibrated(model, images, fuse="all")
    assert {s.name: s.fused for s in fused.meta["plan"]} == {
        "relu": "sum after it",  # of one reader, and overwritten by nobody
        "gelu": "nothing beside it to take in",
        "silu": "what the sum after it reads is overwritten",
    }
    assert torch.equal(fused(images), plain(images))
    assert sum(isinstance(m, MeanSparse) for m in fused.modules()) == 3


def two_names(m, x):
    y = m.bn(m.conv(x))
    older = y.flatten(1)
    y += m.conv(x)
    return F.relu(y) * older.mean()


def norms_input(overwrite):
    """Return a forward that overwrites what a norm has read, before the place where a fused call would read it."""

    def forward(m, x):
        a = m.conv(x)
        other = a * 2
        y = F.relu(m.bn(a))
        overwrite(m, a)
        return y + other

    return forward


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def operators_input(m, x):
    a = m.conv(x)
    other, y = a * 2, F.relu(a)
    a.mul_(0.5)
    return y + other


NOTHING = "nothing beside it to take in"
HAZARDS = {
    "a product of two": (lambda m, x: F.relu(m.conv(x) * m.conv(x + 1)), NOTHING),
    "a difference": (lambda m, x: F.relu(m.conv(x).sub(m.conv(x + 1))), NOTHING),
    "one channel becomes several": (lambda m, x: F.relu(m.conv(x)[:, :1] * m.gamma), NOTHING),
    "the operator's input": (operators_input, "what the sum after it reads is overwritten"),
    "by a function of its own": (norms_input(lambda m, a: Halved.apply(a)), "sum after it"),
    "channels are shuffled": (lambda m, x: F.relu(F.channel_shuffle(m.conv(x) * m.gamma, 2)), NOTHING),
    "channels become pixels": (lambda m, x: F.relu(F.pixel_shuffle(m.conv(x) * m.gamma, 2)), NOTHING),
    "pixels become channels": (lambda m, x: F.relu(F.pixel_unshuffle(m.conv(x) * m.gamma, 2)), NOTHING),
    "a parameter in another order": (
        lambda m, x: F.relu(m.conv(x) * m.square.transpose(0, 1).reshape(1, 8, 1, 1)),
        NOTHING,
    ),
    "inplace by keyword": (norms_input(lambda m, a: F.hardsigmoid(a, inplace=True)), "sum after it"),
    "by its name, with a keyword": (norms_input(lambda m, a: torch.neg_(input=a)), "sum after it"),
    "inplace by position": (norms_input(lambda m, a: F.hardsigmoid(a, True)), "sum after it"),
    "a module in place": (norms_input(lambda m, a: m.hard(a)), "sum after it"),
    "through a view": (norms_input(lambda m, a: a.flatten().mul_(0.5)), "sum after it"),
    "as where the result goes": (norms_input(lambda m, a: torch.neg(a, out=a)), "sum after it"),
    "by nobody: dropout does nothing": (norms_input(lambda m, a: m.drop(a)), "norm, sum after it"),
    "the sum is read under an older name": (two_names, NOTHING),
}


def hazardous(forward):
    torch.manual_seed(0)
    modules = {"bn": nn.BatchNorm2d(8), "hard": nn.Hardsigmoid(inplace=True), "drop": nn.Dropout(inplace=True)}
    model = Functional(forward, conv=nn.Conv2d(3, 8, 3), **modules)
    model.gamma = nn.Parameter(torch.randn(8, 1, 1))
    model.square = nn.Parameter(torch.randn(2, 4))
    model.position = nn.Parameter(torch.randn(1, 8, 6, 6))
    model.bn.running_var.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", HAZARDS)
def test_what_must_not_be_moved(name):
    forward, expected = HAZARDS[name]
    model = hazardous(forward)
    fused = msfx.transform(model, IMAGES, fuse="all")
    torch.testing.assert_close(fused(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert [s.fused for s in fused.meta["plan"] if s.skipped is None] == [expected]


@pytest.mark.parametrize("overwrite", [lambda m, a: F.relu_(a), lambda m, a: F.silu(a, inplace=True)])
def test_an_activation_that_is_left_in_place_overwrites(overwrite):
    model = hazardous(norms_input(overwrite))
    fused = msfx.transform(model, IMAGES, fuse="all", placement=msfx.Placement(exclude=("relu_1", "silu")))
    torch.testing.assert_close(fused(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert [s.fused for s in fused.meta["plan"] if s.skipped is None] == ["sum after it"]


def test_a_published_operator_does_not_only_move_values():
    graph_module = torch.fx.symbolic_trace(nn.Sequential(nn.Dropout()).eval())
    graph_module.add_module("0", Published(8))
    (node,) = graph_module.graph.find_nodes(op="call_module")
    assert not Operators.of(graph_module).moves_only(node)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("before", [True, False])
def test_a_position_embedding_is_no_residual_for_one_image_either(before, count):
    forward = (
        (lambda m, x: F.relu(m.bn(m.conv(x)) + m.position))
        if before
        else (lambda m, x: F.relu(m.bn(m.conv(x))) + m.position)
    )
    model = hazardous(forward)
    fused = msfx.transform(model, IMAGES[:count], fuse="all")
    (site,) = fused.meta["plan"]
    assert site.fused in (NOTHING, "norm; the sum after it is not of two tensors of its shape")
    assert not any({"residual", "shortcut"} & n.kwargs.keys() for n in fused.graph.nodes)
    torch.testing.assert_close(fused(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_norm_over_other_dimensions_than_the_operators_stays_outside():
    model = hazardous(lambda m, x: F.relu(m.bn(m.conv(x))))
    placement = msfx.Placement(channel_dims={"relu": 2})
    fused = msfx.transform(model, IMAGES, fuse="all", placement=placement)
    (site,) = fused.meta["plan"]
    assert (site.channel_dim, site.channels, site.fused) == (2, 6, NOTHING)
    assert torch.equal(fused(IMAGES), model(IMAGES))


def test_a_norm_of_the_batchs_own_statistics_stays_outside():
    model = hazardous(lambda m, x: F.relu(m.bn(m.conv(x))))
    model.bn = nn.BatchNorm2d(8, track_running_stats=False).eval().requires_grad_(False)
    fused = msfx.transform(model, IMAGES, fuse="all")
    assert [s.fused for s in fused.meta["plan"]] == ["the norm has no running statistics"]
    assert torch.equal(fused(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "norm",
    [
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var),
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight * 2, m.bn.bias),
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.bias, m.bn.weight),
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.other.running_var, m.bn.weight, m.bn.bias),
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, training=True),
    ],
)
def test_a_functional_norm_of_other_parameters_stays(norm):
    layers = {"conv": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6), "other": nn.BatchNorm2d(6)}
    net = Functional(lambda m, x: F.relu(norm(m, m.conv(x))), **layers).eval().requires_grad_(False)
    for buffer in net.other.buffers():
        buffer += 1
    state = copy.deepcopy(net.state_dict())
    fused = msfx.transform(net, IMAGES, fuse="all")
    assert F.batch_norm in [node.target for node in fused.graph.nodes]
    net.load_state_dict(state)
    expected = net(IMAGES)
    net.load_state_dict(state)
    torch.testing.assert_close(fused(IMAGES), expected, rtol=0, atol=0)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_functional_norm_of_one_module_is_taken(by_name):
    def forward(m, x):
        state = {"running_mean": m.bn.running_mean, "running_var": m.bn.running_var, "weight": m.bn.weight}
        x = m.conv(x)
        if by_name:
            return F.relu(F.batch_norm(x, bias=m.bn.bias, eps=0.5, **state))
        return F.relu(F.batch_norm(x, *state.values(), m.bn.bias, False, 0.1, 0.5))

    net = Functional(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)).eval().requires_grad_(False)
    for tensor in (net.bn.running_mean, net.bn.running_var, net.bn.weight, net.bn.bias):
        nn.init.uniform_(tensor, 0.5, 2)
    fused = msfx.transform(net, IMAGES, fuse="all")
    assert F.batch_norm not in [node.target for node in fused.graph.nodes]
    torch.testing.assert_close(fused(IMAGES), net(IMAGES))


def test_a_norm_in_another_gradient_mode_stays():
    def forward(m, x):
        x = m.conv(x)
        with torch.no_grad():
            y = m.bn(x)
        return F.relu(y) + x

    net = Functional(forward, conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)).eval().requires_grad_(False)
    fused = msfx.transform(net, IMAGES, fuse="all")
    assert "bn" in [node.target for node in fused.graph.nodes]
    torch.testing.assert_close(fused(IMAGES), net(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("add", [lambda x, y: x + y, lambda x, y: y + x])
def test_the_norm_of_either_operand_of_a_sum_is_taken(add):
    layers = {"stem": nn.Conv2d(3, 6, 3), "conv": nn.Conv2d(6, 6, 3, padding=1), "bn": nn.BatchNorm2d(6)}
    net = Functional(lambda m, x: F.relu(add(x := m.stem(x), m.bn(m.conv(x)))), **layers).eval().requires_grad_(False)
    fused = msfx.transform(net, IMAGES, fuse="all")
    assert not {"bn", operator.add} & {node.target for node in fused.graph.nodes}
    torch.testing.assert_close(fused(IMAGES), net(IMAGES))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, of forward mode
@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_forward_mode_derivatives_by_a_fused_norms_parameters(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    images = torch.rand(2, 3, 8, 8)
    sparse = msfx.transform(net, images, fuse="all")
    sparse(images)  # from here on it knows scale and shift
    tangents = []
    for model in (net, sparse):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(net.get_parameter(name).clone(), torch.ones(4))
            tangents.append(forward_ad.unpack_dual(functional_call(model, {name: dual}, (images,))).tangent)
    torch.testing.assert_close(*tangents)
    assert tangents[0].any()
