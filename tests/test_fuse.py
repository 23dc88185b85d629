"""Fusion of norms and sums into the operator: the same function, fewer calls, and everything undone by restore."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.errors import StateError
from meansparse_fx.nn import MeanSparse

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class PostActivation(nn.Module):
    """As ResNets: convolution, norm, sum, activation."""

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


@pytest.fixture(params=[PostActivation, PreActivation])
def model(request):
    return build(request.param)


@pytest.fixture
def images():
    return IMAGES.double()


def calibrated(model, images, **options):
    sparse = msfx.transform(model, images, **options)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.4)
    return sparse


def test_what_is_fused(images):
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
        if key.endswith("running_var"):
            value.mul_(2)
    fused.load_state_dict(other)
    plain = calibrated(model, images)
    plain.load_state_dict(other)
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
    assert kept[1] < 0.9 * kept[0]


def test_gradients_wanted_for_a_norm_decline_it(model, images):
    model.requires_grad_(True)
    fused = calibrated(model, images, fuse="all")
    assert {s.fused for s in fused.meta["plan"]} <= {
        "the norm's parameters want gradients: model.requires_grad_(False)",
        "sum",  # its norm has no parameters, or stays outside
        "norm + sum",
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
        "relu": "sum behind it",  # of one reader, and overwritten by nobody
        "gelu": "nothing beside it to take in",
        "silu": "what the sum behind it reads is overwritten",
    }
    assert torch.equal(fused(images), plain(images))
    assert sum(isinstance(m, MeanSparse) for m in fused.modules()) == 3
