"""Copies: what deepcopy makes, faster, and what it forgets or refuses."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

import meansparse_fx as msfx
from meansparse_fx.copies import copied
from meansparse_fx.errors import CaptureError
from tests.models import Functional

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(layer=None):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    return model.append(nn.Linear(64, 3)).eval()


def gradients(model):
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_transforms(model):
    """Compare a model and what `transform` makes of it: values, and gradients of the parameters."""
    sparse = msfx.transform(model, IMAGES)
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    expected, got = gradients(model), gradients(sparse)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    return sparse


class _SaysItself(nn.Identity):
    def __init__(self):
        super().__init__()
        self.copies = 0

    def __deepcopy__(self, memo):
        own = _SaysItself()
        own.copies = self.copies + 1
        return own


class _Pickled(nn.Identity):
    def __getstate__(self):
        return super().__getstate__() | {"thawed": True}


def test_a_copy_is_what_deepcopy_makes():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.BatchNorm1d(3), nn.Sequential(shared, nn.ReLU()), _SaysItself(), _Pickled())
    net.register_forward_hook(lambda module, args, out: out)
    net.eval().facts = {"list": [shared, {"weight": shared.weight}], "self": net, "table": OrderedDict(a=(1, 2.5, "x"))}
    net._compiled_call_impl = print
    own, expected = copied(net), copy.deepcopy(net)
    for copy_ in (own, expected):
        assert copy_[0] is copy_[2][0] is copy_.facts["list"][0]
        assert copy_.facts["list"][1]["weight"] is copy_[0].weight is not shared.weight
        assert copy_.facts["self"] is copy_
        assert copy_.facts["table"] == net.facts["table"]
        assert copy_.facts["table"] is not net.facts["table"]
        assert copy_[3].copies == 1
        assert copy_[4].thawed
        assert len(copy_._forward_hooks) == 1
        assert copy_._compiled_call_impl is None
    assert own.__dict__.keys() == expected.__dict__.keys()
    assert [(n, type(m)) for n, m in own.named_modules()] == [(n, type(m)) for n, m in net.named_modules()]
    assert torch.equal(own(torch.eye(3)), expected(torch.eye(3)))
    for name, value in own.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])
        assert value.data_ptr() != net.state_dict()[name].data_ptr()


def test_a_copy_shares_what_its_memo_says():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    own = copied(net, {id(p): p for p in net.parameters()})
    assert own[0].weight is net[0].weight
    assert own[1].running_mean is not net[1].running_mean


# Eval modes, and graphs.


def extractor():
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(resnet18(num_classes=5), {"layer2": "y"})


def test_a_feature_extractor_stays_in_eval_mode():
    model = Functional(lambda m, x: m.body(x)["y"].mean((2, 3)), body=extractor()).eval()
    for own in (copied(model), msfx.transform(model, IMAGES)):
        assert not any(m.training for m in own.modules())
        assert torch.equal(own(IMAGES), model(IMAGES))
        assert own.train().body.bn1.training  # it still switches graphs


def test_a_copied_graph_keeps_what_graphs_forget():
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    graph.register_buffer("passing", torch.ones(1), persistent=False)
    graph.unused = nn.Linear(2, 2)
    graph.register_forward_hook(lambda module, args, result: result * 2)
    own = copied(net(graph))
    assert own[0].state_dict().keys() == graph.state_dict().keys()
    assert "passing" in own[0]._buffers
    assert own[0].graph.owning_module is own[0]
    with torch.no_grad():
        own[0].unused.weight.zero_()
        own[0].get_submodule("0").weight.zero_()
        own[0].get_submodule("0").bias.fill_(1)
    assert torch.equal(own[0](IMAGES), torch.full((2, 4, 6, 6), 2.0))
    assert graph.unused.weight.any()
    assert torch.equal(msfx.transform(net(graph), IMAGES)(IMAGES), net(graph)(IMAGES))


class Rebuilt(nn.Identity):
    """Copied by its constructor, which forgets eval mode, hooks and, if told so, more."""

    def __init__(self, value=1.0, buffers=1):
        super().__init__()
        for i in range(buffers):
            self.register_buffer(f"b{i}", torch.full((2,), value))

    def __deepcopy__(self, memo):
        return Rebuilt()


def test_what_a_modules_own_way_of_copying_forgets_is_mended():
    model = net().append(Rebuilt()).eval()
    model[-1].register_forward_hook(lambda module, args, result: result * 2)
    sparse = assert_transforms(model)
    assert not sparse.get_submodule("6").training


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Rebuilt(value=2.0), r"6 \(Rebuilt\) has another b0 when it is copied"),
        (Rebuilt(buffers=2), r"6 \(Rebuilt\) has other buffers when it is copied"),
    ],
)
def test_a_copy_that_is_another_is_refused(module, message):
    with pytest.raises(CaptureError, match=message):
        msfx.transform(net().append(module).eval(), IMAGES)


def test_a_module_that_is_its_own_copy_is_refused():
    class Single(nn.Identity):
        def __deepcopy__(self, memo):
            return self

    with pytest.raises(CaptureError, match=r"6 \(Single\) returns itself when it is copied"):
        msfx.transform(net().append(Single()).eval(), IMAGES)


def test_what_cannot_be_copied_is_refused_with_a_cure():
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"Sequential cannot be copied .*lock.*: take out what it holds besides"):
        msfx.transform(model, IMAGES)


# Parameters.


def test_hooks_and_attributes_of_parameters_survive():
    model, calls = net(), []
    weight, bias = model[0].weight, model[0].bias
    weight.register_hook(lambda gradient: gradient * 3)
    weight.group = "slow"
    bias.register_hook(lambda gradient: gradient * 5)
    bias.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.shape)))
    bias.requires_grad_(False)
    sparse = msfx.transform(model, IMAGES)
    assert sparse.get_parameter("0.weight").group == "slow"
    assert not sparse.get_parameter("0.bias").requires_grad
    for m in (model, sparse):
        m.requires_grad_(True)
    expected, got = gradients(model), gradients(sparse)
    assert calls == [(4,), (4,)]
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not torch.equal(expected["0.weight"], gradients(net())["0.weight"])


def test_memory_that_tensors_share_stays_shared():
    model = net()
    weight = model[0].weight
    model.tied, model.same_memory = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    model.tied.weight = weight
    model.same_memory.weight = nn.Parameter(weight.detach())
    model.register_buffer("row", weight.detach()[1])
    both = torch.rand(2, 3)
    model.register_buffer("both", both)
    model.register_buffer("second", both[1], persistent=False)
    own = copied(model)
    assert own.tied.weight is own[0].weight
    with torch.no_grad():
        own[0].weight.zero_()
        own.both.zero_()
    assert not any(t.any() for t in (own.same_memory.weight, own.row, own.second))
    assert all(t.any() for t in (weight, model.same_memory.weight, model.row, model.second))
    assert isinstance(own.same_memory.weight, nn.Parameter)


def test_parameters_that_lie_side_by_side_in_a_file_get_memory_of_their_own():
    flat, model = torch.rand(10), nn.Linear(3, 2)
    model.weight, model.bias = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[6:8])
    own = copied(model)
    assert own.weight.untyped_storage().nbytes() == 24
    assert torch.equal(own.weight, model.weight)


# What earlier forwards left.

NORMS = {
    "weight_norm, old": nn.utils.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


class OwnConv(nn.Module):
    """As libraries write them: torch.fx traces into it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 4, 3), OwnConv])
@pytest.mark.parametrize("name", NORMS)
def test_reparametrised_weights(name, layer):
    torch.manual_seed(0)
    module = layer()
    NORMS[name](module)
    model = net(module)
    gradients(model)
    assert_transforms(model)


def test_a_parametrised_slope_is_not_forgotten():
    model = net()
    model[1] = nn.PReLU(4)
    parametrize.register_parametrization(model[1], "weight", nn.Tanh())
    model.eval()
    plan = msfx.inspect(model, IMAGES)
    assert [(s.activation.name, s.skipped is None) for s in plan] == [("tanh", False), ("prelu", True), ("relu", True)]
    assert_transforms(model)


class Caching(nn.Module):
    """Keeps in a dict what it computes from parameters, as LeViT's attention does, and tensors wherever one can."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.cache, self.latest, self.all, self.by_name = {}, None, [], defaultdict(list)

    def forward(self, x):
        if "scale" not in self.cache:
            self.cache["scale"] = self.scale.exp()
        self.latest = x * self.cache["scale"]
        self.all.append(self.latest)
        self.by_name["latest"].append(self.latest)
        return self.latest


def test_caches_of_an_earlier_forward_are_left_out():
    model = net(nn.Sequential(nn.Conv2d(3, 4, 3), Caching()))
    gradients(model)
    own = copied(model)
    assert own[0][1].cache == {}
    assert torch.equal(own[0][1].latest, model[0][1].latest)
    assert not own[0][1].latest.requires_grad
    sparse = msfx.transform(model, IMAGES)
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    assert "0.1.scale" in gradients(sparse)


# Wrappers inside.


@torch.no_grad()
def test_a_compiled_module_inside_is_copied_without_its_wrapper():
    model = net()
    model[2], model[3] = torch.compile(model[2], backend="eager"), torch.compile(model[3], backend="eager")
    sparse = assert_transforms_to(model, ["1", "3"])
    assert type(sparse.get_submodule("2")) is nn.Conv2d
    assert sparse.get_submodule("2").weight is not model[2].weight


def test_data_parallel_inside():
    model = net()
    model[0] = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())).eval()
    assert_transforms_to(model, ["0.module.1", "1", "3"])


def assert_transforms_to(model, sites):
    sparse = msfx.transform(model, IMAGES)
    assert list(msfx.operators(sparse)) == sites
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    return sparse


@torch.library.custom_op("tests_copies::rounded", mutates_args=())
def rounded(x: torch.Tensor) -> torch.Tensor:
    """A custom operator, which `copy.deepcopy` refuses."""
    return torch.round(x * 7) / 7


rounded.register_fake(torch.empty_like)


def test_an_operator_of_a_library_is_no_part_of_the_copy():
    model = net()
    model[1].op = rounded
    assert copied(model)[1].op is rounded
    assert_transforms_to(model, ["1", "3"])


def test_a_model_made_under_inference_mode():
    """Its parameters are tensors that never meet autograd; the copy's do."""
    images = torch.rand(3, 3, 8, 8)
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        expected = model(images).clone()
        sparse = msfx.transform(model, images)
        msfx.calibrate(sparse, [images], progress=False)
    assert torch.equal(sparse(images), expected)
    msfx.set_alpha(sparse, 0.2)
    (gradient,) = torch.autograd.grad(sparse(images.requires_grad_()).sum(), images)
    assert gradient.abs().sum() > 0
