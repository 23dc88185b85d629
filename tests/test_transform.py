"""transform, restore and the switches: what changes, and above all what does not."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import meansparse_fx as msfx
from meansparse_fx.errors import SiteError, StateError, StatisticsError
from meansparse_fx.nn import MeanSparse
from tests.models import Functional


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.split(5), progress=False)
    return sparse


def test_sites_and_their_channels(net, images, sites):
    assert {s.name: s.channels for s in msfx.inspect(net, images)} == sites
    assert {n: m.channels for n, m in msfx.operators(msfx.transform(net, images)).items()} == sites


def test_graph_after_transform(sparse, sites):
    """Each activation is one call of an operator; nothing else was added but the learned slope's get_attr."""
    calls = [n.target for n in sparse.graph.nodes if n.op == "call_module" and n.target.startswith("meansparse.")]
    assert calls == [f"meansparse.{name}" for name in sites]
    assert [n.target for n in sparse.graph.nodes if n.op == "get_attr"] == ["slope.weight"]
    assert not [n for n in sparse.graph.nodes if n.target in ("relu", "slope", torch.nn.functional.gelu)]
    assert not any(module.training for module in sparse.modules())


def test_alpha_zero_is_the_base_bit_for_bit(net, images, sparse):
    x, y = (images.clone().requires_grad_() for _ in range(2))
    expected, got = net(x), sparse(y)
    assert torch.equal(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    assert torch.equal(y.grad, x.grad)


def test_input_model_is_never_changed(net, images):
    before, names = copy.deepcopy(net.state_dict()), [n for n, _ in net.named_modules()]
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.5)
    with torch.no_grad():
        sparse.conv1.weight.zero_()
    assert [n for n, _ in net.named_modules()] == names
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_state_dict_keys(net, sparse, sites):
    ours = {k for k in sparse.state_dict() if k.startswith("meansparse.")}
    assert sparse.state_dict().keys() - ours == net.state_dict().keys()
    assert ours == {f"meansparse.{s}.{b}" for s in sites for b in ("mean", "std", "alpha", "_extra_state")}


def test_state_dict_round_trip(net, images, sparse):
    msfx.set_alpha(sparse, 0.3)
    other = msfx.transform(net, images)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(images), sparse(images))
    assert not torch.equal(other(images), net(images))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(sparse, images, copier):
    msfx.set_alpha(sparse, 0.3)
    msfx.set_backward(sparse, "identity")
    clone = copier(sparse)
    assert torch.equal(clone(images), sparse(images))
    assert all(m.backward == "identity" for m in msfx.operators(clone).values())
    base = msfx.restore(clone)
    assert base.state_dict().keys() == msfx.restore(sparse).state_dict().keys()


def test_restore_refuses_what_is_not_transformed(net, images, sparse):
    for model in (net, msfx.restore(sparse)):
        with pytest.raises(StateError, match="restore needs the GraphModule that transform returned"):
            msfx.restore(model)


def test_restore_leaves_a_functional_activation_its_own_weight(images):
    def forward(self, x):
        return torch.nn.functional.prelu(self.conv(x), self.slope.weight)

    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), slope=nn.PReLU(4)).eval()
    base = msfx.restore(msfx.transform(model, images))
    assert torch.equal(base(images), model(images))


def test_what_was_restored_is_transformed_again(images):
    """Activations that its graph does not call refuse hooks, those of capture too."""
    model = Functional(lambda self, x: self.own(x), own=nn.ReLU(), unused=nn.ReLU()).eval()
    placement = msfx.Placement(channel_dims={"own": 1})
    sparse = msfx.transform(model, images, placement=placement)
    again = msfx.transform(msfx.restore(sparse), images, placement=placement)
    assert list(msfx.operators(again)) == list(msfx.operators(sparse))
    assert torch.equal(again(images), model(images))
    with pytest.raises(StateError, match="does not call unused"):
        again.unused.register_forward_hook(print)


def test_several_transformed_models_are_switched_one_by_one(sparse):
    """All switches found operators by name: they set those of the last model alone."""
    for verb in (lambda m: msfx.set_alpha(m, 0.1), lambda m: msfx.set_backward(m, "identity"), msfx.get_alpha):
        with pytest.raises(StateError, match="ModuleList holds several transformed models, whose sites share names"):
            verb(nn.ModuleList([sparse, copy.deepcopy(sparse)]))
    assert msfx.get_alpha(nn.ModuleList([sparse, sparse])) == 0


def test_restore_gives_the_base_back(net, images, sparse, sites):
    msfx.set_alpha(sparse, 0.4)
    base = msfx.restore(sparse)
    assert "plan" not in base.meta
    assert not base.graph.find_nodes(op="get_attr")
    assert torch.equal(base(images), net(images))
    assert base.state_dict().keys() == net.state_dict().keys()
    assert not any(isinstance(m, MeanSparse) for m in base.modules())
    again = msfx.inspect(base, images)
    assert [s.name for s in again] == list(sites)
    assert len(msfx.operators(sparse)) == len(sites), "restore must not touch the model it is given"


def test_operator_does_what_the_paper_says(net, images, sparse):
    """The first operator's output, recomputed in NumPy from the module's input."""
    msfx.set_alpha(sparse, 0.7)
    operator = msfx.operators(sparse)["relu"]
    seen = {}
    operator.register_forward_hook(lambda m, i, o: seen.update(x=i[0], y=o))
    sparse(images)
    x = seen["x"].detach().double().numpy()
    mean, std = operator.mean.double().numpy(), operator.std.double().numpy()
    band = abs(x - mean[:, None, None]) <= 0.7 * std[:, None, None]
    expected = x.copy()
    for c in range(x.shape[1]):
        expected[:, c][band[:, c]] = mean[c]
    assert 0.2 < band.mean() < 0.9
    torch.testing.assert_close(
        seen["y"].detach().double(), torch.from_numpy(expected).clamp_min(0), rtol=1e-6, atol=1e-6
    )


def test_in_place_readers_see_the_activation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.conv(x)
            y = self.act(h)
            return h + y  # h is relu(h) by now

    torch.manual_seed(0)
    net, images = Net().eval(), torch.randn(2, 3, 4, 4)
    assert torch.equal(msfx.transform(net, images)(images), net(images))


def test_readers_of_an_overwritten_input_do_not_see_what_a_hook_returned():
    """The activation overwrites y with relu(y); its hook returns another tensor."""

    def forward(self, x):
        y = self.conv(x)
        return self.act(y) + 10 * y

    model = Functional(forward, conv=nn.Conv2d(3, 4, 1), act=nn.ReLU(inplace=True)).eval()
    model.act.register_forward_hook(lambda module, args, output: output * 0.5)
    images = torch.rand(2, 3, 4, 4)
    sparse = msfx.transform(model, images)
    assert torch.equal(sparse(images), model(images))
    assert torch.equal(msfx.restore(sparse)(images), model(images))


def test_set_alpha_by_site(sparse, images):
    msfx.set_alpha(sparse, {"relu": 0.5, "gelu": 0.25})
    assert msfx.get_alpha(sparse) == {"relu": 0.5, "relu_1": 0.0, "slope": 0.0, "gelu": 0.25}
    with pytest.raises(StateError, match="no such site: nope"):
        msfx.set_alpha(sparse, {"nope": 0.1})


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_bad_alpha(sparse, alpha):
    with pytest.raises(ValueError, match=r"alpha.* must be finite and not negative"):
        msfx.set_alpha(sparse, alpha)


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        (lambda m: msfx.set_backward(m, "steep"), "backward must be one of exact, identity, smooth, got 'steep'"),
        (lambda m: msfx.set_variant(m, "median"), "variant must be one of mean, edge, smooth, got 'median'"),
        (lambda m: msfx.set_variant(m, centre="median"), "centre must be one of channel, zero, layer, got 'median'"),
        *(
            (lambda m, verb=verb, wrong=wrong: verb(m, "smooth", steepness=wrong), "steepness must be finite and pos")
            for verb in (msfx.set_backward, msfx.set_variant)
            for wrong in (0, -1.0, math.nan, math.inf)
        ),
    ],
)
def test_bad_switches_change_nothing(sparse, switch, message):
    before = {name: operator.switches() for name, operator in msfx.operators(sparse).items()}
    with pytest.raises(ValueError, match=message):
        switch(sparse)
    assert {name: operator.switches() for name, operator in msfx.operators(sparse).items()} == before


def test_forward_does_not_depend_on_backward_and_gradients_do(sparse, images):
    msfx.set_alpha(sparse, 0.5)
    outputs, grads = {}, {}
    for mode in ("exact", "identity", "smooth"):
        msfx.set_backward(sparse, mode)
        x = images.clone().requires_grad_()
        outputs[mode] = sparse(x)
        outputs[mode].sum().backward()
        grads[mode] = x.grad
    assert torch.equal(outputs["exact"], outputs["identity"])
    assert torch.equal(outputs["exact"], outputs["smooth"])
    assert not torch.equal(grads["exact"], grads["identity"])
    assert not torch.equal(grads["exact"], grads["smooth"])


def test_one_image_without_a_batch_is_refused():
    """Its channels are dimension 0 of 3, which may be as long as dimension 1 of a batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(net(images[0]), net(images)[0])
    sparse = msfx.transform(net, images)
    stats = msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.5)
    for use in (
        lambda: sparse(images[0]),
        lambda: torch.func.vmap(sparse)(images),
        lambda: msfx.calibrate(sparse, list(images), progress=False),
    ):
        with pytest.raises(SiteError, match=r"1: an input of 3 dimensions, \[8, 8, 8\].*image.unsqueeze\(0\)"):
            use()
    options = {"statistics": stats, "alpha": 0.5, "inner": "eager"}  # a graph for each number of dimensions
    compiled = torch.compile(net, backend="meansparse", options=options)
    torch.testing.assert_close(compiled(images[0]), sparse(images)[0])


def test_centres(sparse):
    msfx.set_alpha(sparse, 0.5)
    operator = msfx.operators(sparse)["gelu"]
    assert torch.equal(operator.centre, operator.mean)
    msfx.set_variant(sparse, centre="zero")
    assert not operator.centre.any()
    msfx.set_variant(sparse, centre="layer")
    torch.testing.assert_close(operator.centre, operator.mean.mean().expand(6))


def test_statistics_keep_their_precision_in_a_half_model(sparse):
    mean = msfx.operators(sparse)["gelu"].mean.clone()
    half = copy.deepcopy(sparse).bfloat16()
    operator = msfx.operators(half)["gelu"]
    assert half.conv1.weight.dtype == torch.bfloat16
    assert torch.equal(operator.mean, mean)
    assert half(torch.rand(2, 3, 9, 9).bfloat16()).dtype == torch.bfloat16


def test_statistics_by_argument_and_by_file(net, images, sparse, tmp_path):
    stats = msfx.calibrate(sparse, [images], progress=False)
    stats.save(tmp_path / "s.safetensors")
    msfx.set_alpha(sparse, 0.3)
    for given in (stats, tmp_path / "s.safetensors"):
        assert torch.equal(msfx.transform(net, images, statistics=given, alpha=0.3)(images), sparse(images))


def test_bad_input_has_its_own_error(net, images, sparse):
    with pytest.raises(StateError, match="has no statistics: calibrate first"):
        msfx.transform(net, images, alpha=0.2)
    with pytest.raises(StateError, match=r"train"):
        msfx.transform(net.train(), images)
    net.eval()
    with pytest.raises(StateError, match="transform"):
        msfx.transform(sparse, images)
    with pytest.raises(StateError, match="no MeanSparse operators"):
        msfx.set_alpha(net, 0.1)
    with pytest.raises(SiteError, match="no activation"):
        msfx.transform(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), images)
    with torch.no_grad():
        net.head.bias[0] += 1
    stats = msfx.calibrate(sparse, [images], progress=False)
    with pytest.raises(StatisticsError, match="other weights"):
        msfx.transform(net, images, statistics=stats)


def test_placement_chooses(net, images):
    placement = msfx.Placement(exclude=("^relu$",), predicate=lambda site: site.activation.name != "prelu")
    plan = msfx.inspect(net, images, placement)
    assert {s.name: s.skipped for s in plan if s.skipped} == {
        "relu": "placement: excluded",
        "slope": "placement: predicate said no",
    }
    sparse = msfx.transform(net, images, placement=placement)
    assert list(msfx.operators(sparse)) == ["relu_1", "gelu"]
    assert torch.equal(sparse(images), net(images))


def test_float64_model_keeps_float64_statistics(net, images):
    sparse = msfx.transform(net.double(), images.double())
    msfx.calibrate(sparse, [images.double()], progress=False)
    assert msfx.operators(sparse)["relu"].std.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "identity"])
def test_compiles_in_one_graph_without_recompiling_for_alpha(sparse, images, mode):
    msfx.set_alpha(sparse, 0.4)
    msfx.set_backward(sparse, mode)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True)
    for alpha in (0.4, 0.1, 0.0):
        msfx.set_alpha(sparse, alpha)
        with torch.compiler.set_stance("default" if alpha == 0.4 else "fail_on_recompile"):
            x, y = (images.clone().requires_grad_() for _ in range(2))
            expected, got = sparse(x), compiled(y)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            expected.square().sum().backward()
            got.square().sum().backward()
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-4)


def test_a_compiled_programs_smooth_gradient_follows_its_steepness(sparse, images):
    msfx.set_alpha(sparse, 0.4)
    torch.compiler.reset()
    compiled, gradients = torch.compile(sparse, backend="eager", fullgraph=True), []
    for steepness in (4.0, 20.0):
        msfx.set_backward(sparse, "smooth", steepness)
        with torch.compiler.set_stance("default" if steepness == 4 else "fail_on_recompile"):
            x, y = (images.clone().requires_grad_() for _ in range(2))
            sparse(x).square().sum().backward()
            compiled(y).square().sum().backward()
        torch.testing.assert_close(y.grad, x.grad)
        gradients.append(x.grad)
    assert not torch.allclose(*gradients)


def test_exports_to_plain_aten(sparse, images):
    msfx.set_alpha(sparse, 0.4)
    program = torch.export.export(sparse, (images,))
    assert not [n for n in program.graph.nodes if "meansparse" in str(n.target) and n.op == "call_function"]
    torch.testing.assert_close(program.module()(images), sparse(images))


class Dropping(nn.Module):
    """Drops in its forward, at a rate that may be zero."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.rate_of_dropout = rate

    def forward(self, x):
        return torch.nn.functional.dropout(self.act(self.conv(x)), self.rate_of_dropout, self.training)


def test_train_mode_says_once_what_stays_off(images):
    sparse = msfx.transform(nn.Sequential(Dropping(), nn.Dropout(0.5), Dropping(0.0)).eval(), images)
    sparse.eval()
    with pytest.warns(
        UserWarning, match=r"dropout, stochastic depth .* stays off in 0 \(Dropping\)\. To train"
    ) as said:
        sparse.train()
    assert said[0].filename == __file__
    assert len(said) == 1
    sparse.eval().train()  # once
    assert sparse.get_submodule("1").training


def test_train_mode_names_three_and_counts_the_others(images):
    for n, rest in ((3, r"\. To train"), (5, r" and 2 more\. To train")):
        sparse = msfx.transform(nn.Sequential(*(Dropping() for _ in range(n))).eval(), images)
        with pytest.warns(UserWarning, match=rf"0 \(Dropping\), 1 \(Dropping\), 2 \(Dropping\){rest}"):
            sparse.train()


def test_train_mode_says_nothing_where_nothing_stays_off(net, images):
    msfx.transform(net, images).train()


@pytest.mark.parametrize("fuse", ["activation", "all"])
def test_an_operator_is_one_call_to_whoever_traces_a_transformed_model(images, fuse):
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = Functional(lambda self, x: self.block(x).mean((2, 3)), block=block).eval().requires_grad_(False)
    sparse = msfx.transform(model, images, fuse=fuse)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.5)
    traced, extractor = fx.symbolic_trace(sparse), create_feature_extractor(sparse, {"mean": "y"})
    assert sum(isinstance(module, MeanSparse) for module in traced.modules()) == 1
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sparse(leaf).sum(), leaf)
    for other in (traced, lambda x: extractor(x)["y"]):
        assert torch.equal(other(images), sparse(images))
        assert torch.equal(torch.autograd.grad(other(leaf).sum(), leaf)[0], expected)
    msfx.set_alpha(sparse, 0.0)
    assert torch.equal(traced(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operators_hold_single_precision_or_that_of_a_double_model(net, images, dtype):
    sparse = msfx.transform(net.to(dtype), images.to(dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {m.get_buffer(name).dtype for m in msfx.operators(sparse).values() for name in ("mean", "std")} == {expected}
    assert sparse(images.to(dtype)).dtype == dtype
