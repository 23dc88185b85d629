"""What each form must move: exact on models small enough to count by hand, and true of what a model calls."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from benchmarks.contenders import WideResNet
from meansparse_fx.cost.tally import Tally, kept_bytes
from meansparse_fx.kernels import autograd, operator

from .models import Functional


def moved(found):
    """Return by form (calls, passes over the site) of forward and of backward, and passes kept; two images of 4x6x6."""
    site = 2 * 4 * 6 * 6 * 4

    def passes(count):
        assert count * 4 % site == 0  # a mask is a quarter
        return count / site

    return {
        form: (
            (c.forward.calls, passes(c.forward.read), passes(c.forward.written)),
            (c.backward.calls, passes(c.backward.read), passes(c.backward.written)),
            passes(c.kept),
        )
        for form, c in found.items()
    }


@pytest.fixture
def norm_and_relu():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.fixture
def images():
    return torch.rand(2, 1, 8, 8)


@pytest.fixture
def preactivation():
    """A sum that others read, after it a norm and a ReLU."""

    def run(m, x):
        x = m.stem(x)
        v = m.inner(m.conv(x)) + x
        return v + m.last(m.relu(m.norm(v)))

    return Functional(
        run,
        stem=nn.Conv2d(1, 4, 3),
        conv=nn.Conv2d(4, 4, 1),
        inner=nn.BatchNorm2d(4),
        norm=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
        last=nn.Conv2d(4, 4, 1),
    ).eval()


def test_norm_and_relu_by_hand(norm_and_relu, images):
    found = msfx.cost(norm_and_relu, images)
    assert [(site.name, site.before) for site in found] == [("2", "norm")]
    # Of the published form: alpha compared and asked for, a root and a product a channel; then x - mean, its size, the
    # comparison (a mask is a quarter of a float32 tensor), and `where`, which reads mask and x. Backward makes a zero.
    published = ((6.25, 5.25), (4.25, 3), 2.25)
    assert moved(found.total) == {
        "base": ((2, 2, 2), (2, 3, 2), 2),
        "published": ((10, *published[0]), (4, *published[1]), published[2]),
        "branch-free": ((6, *published[0]), (4, *published[1]), published[2]),
        "ours": ((2, 2, 2), (2, 3, 2), 2),
        "ours, fused": ((1, 1, 1), (1, 2, 1), 1),  # kept: the result
    }


def test_preactivation_by_hand(preactivation, images):
    found = msfx.cost(preactivation, images)
    assert [(site.name, site.before) for site in found] == [("relu", "norm + sum + norm, both results read")]
    cost = moved(found.total)
    # Forward: norm 1:1, sum 2:1, norm 1:1, ReLU 1:1. Backward: ReLU 2:1, norm 1:1, sum 2:1, norm 1:1.
    assert cost["base"] == ((4, 5, 4), (4, 6, 4), 3)
    assert cost["ours"] == cost["base"]
    # Forward reads x and the residual, writes y and the sum; backward reads both gradients and the sum, writes two.
    assert cost["ours, fused"] == ((1, 2, 2), (1, 3, 2), 2)


def test_a_sum_without_norm_has_one_gradient(images):
    model = Functional(
        lambda m, x: m.act(m.a(x) + m.b(x)), a=nn.Conv2d(1, 4, 3), b=nn.Conv2d(1, 4, 3), act=nn.GELU()
    ).eval()
    cost = moved(msfx.cost(model, images).total)
    assert cost["base"] == ((2, 3, 2), (1, 2, 1), 2)
    assert cost["ours, fused"] == ((1, 2, 1), (1, 3, 1), 3)  # kept: x, the residual, y


def test_layer_scale_and_the_sum_behind_by_hand(images):
    def run(m, x):
        x = m.stem(x)
        return x + m.scale * m.conv(m.act(m.conv(x)))

    model = Functional(run, stem=nn.Conv2d(1, 4, 3), conv=nn.Conv2d(4, 4, 1), act=nn.GELU())
    model.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
    found = msfx.cost(model.eval(), images, msfx.Placement(kinds=("residual_branch",)))
    assert [site.before for site in found] == ["LayerScale, sum after it"]
    cost = moved(found.total)
    # Forward: scale 1:1, sum 2:1; ours puts the operator between them. Backward: scale 1:1, the operator 2:1.
    assert cost["base"] == ((2, 3, 2), (1, 1, 1), 1)
    assert cost["ours"] == ((3, 4, 3), (2, 3, 2), 2)
    assert cost["ours, fused"] == ((1, 2, 1), (1, 2, 1), 2)


def test_an_operator_without_its_activation(images):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.CELU()).eval()
    cost = moved(msfx.cost(model, images).total)
    assert cost["base"] == ((0, 0, 0), (0, 0, 0), 1)
    assert cost["ours"] == cost["ours, fused"] == ((1, 1, 1), (1, 2, 1), 2)


def test_bytes_follow_images_and_dtype(norm_and_relu):
    one = msfx.cost(norm_and_relu, torch.rand(2, 1, 8, 8)).total["ours"].both.bytes
    assert msfx.cost(norm_and_relu, torch.rand(6, 1, 8, 8)).total["ours"].both.bytes == 3 * one
    half = msfx.cost(norm_and_relu.bfloat16(), torch.rand(2, 1, 8, 8).bfloat16())
    assert half.total["ours"].both.bytes * 2 == one
    assert half.to_dict()["dtype"] == "bfloat16"


def test_the_model_is_not_changed(norm_and_relu, images):
    msfx.cost(norm_and_relu, images)
    assert all(p.requires_grad for p in norm_and_relu.parameters())
    assert isinstance(norm_and_relu, nn.Sequential)


def test_table_and_dictionary(preactivation, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = msfx.cost(preactivation, images)
    (line,) = (line for line in str(found).splitlines() if line.startswith("relu"))
    assert "norm + sum + norm" in line
    assert "0.02 (8)" in line
    entry = json.loads(json.dumps(found.to_dict()))
    assert (entry["images"], entry["dtype"], len(entry["sites"])) == (2, "float32", 1)
    assert entry["sites"][0]["forms"]["ours, fused"]["forward"] == {"calls": 1, "read": 2304, "written": 2304}
    assert entry["total"] == entry["sites"][0]["forms"]
    assert "published & branch-free & ours & ours, fused" in found.to_latex()


def test_table_breaks_no_word_and_no_number_in_80_columns(preactivation, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = str(msfx.cost(preactivation, images))
    assert {"branch-", "free", "ours,", "fused"} <= set(shown.split())
    for moves in ("forward", "backward", "both"):
        (line,) = (line for line in shown.splitlines() if line.startswith("all sites") and moves in line)
        assert len(re.findall(r"\d\.\d\d \(\d+\)", line)) == 5


@pytest.mark.parametrize("form", ["ours", "ours, fused"])
def test_a_real_model_calls_as_many_operators_as_counted(form, monkeypatch):
    """On tensors without data, each run of the operator in the place of its launch one call that is counted."""
    call = torch.ops.meansparse_fx_cost.call

    def forward(self, *tensors):
        y, *v = call([t for t in tensors if t is not None], 1 + self.operator.options.want_sum)
        return y, v[0] if v else None

    def backward(self, vectors, x, grad, grad_sum, residual, wanted):
        found = call([t for t in (x, residual, grad, grad_sum) if t is not None], 1 + wanted.v)
        return found[0], found[-1]

    torch.manual_seed(0)
    model = WideResNet(10, 1).eval().requires_grad_(False)
    images = torch.rand(2, 3, 8, 8)
    sparse = msfx.transform(copy.deepcopy(model), images, fuse="all" if form == "ours, fused" else "activation")
    total = msfx.cost(model, images).total
    model, sparse, images = model.to("meta"), sparse.to("meta"), images.to("meta")
    for module in (operator, autograd):
        monkeypatch.setattr(module, "is_observed", lambda *_: False)
    monkeypatch.setattr(operator.Call, "forward", forward)
    monkeypatch.setattr(operator.Call, "backward", backward)
    sparse(images)  # computes the norms' scales once

    def calls(net):
        leaf = images.clone().requires_grad_()
        with Tally() as forward:
            y = net(leaf)
        with Tally() as backward:
            torch.autograd.grad(y.sum(), leaf)
        return forward.calls, backward.calls

    (base, own), (b, o) = (calls(model), calls(sparse)), (total["base"], total[form])
    saved = (b.forward.calls - o.forward.calls, b.backward.calls - o.backward.calls)
    assert (base[0] - own[0], base[1] - own[1]) == saved
    assert form == "ours" or min(saved) > 0


ARCHITECTURES = ("WRN-16-4", "resnet50", "convnext_tiny", "swin_t")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_moves_no_more_than_the_base_at_any_site(name):
    if name == "WRN-16-4":
        model, images = WideResNet(16, 4), torch.rand(2, 3, 32, 32)
    else:
        # Small images: bytes shrink alike in all forms.
        model, images = getattr(pytest.importorskip("torchvision").models, name)(), torch.rand(2, 3, 64, 64)
    found = msfx.cost(model.eval(), images)
    assert len(found) == {"WRN-16-4": 13, "resnet50": 49, "convnext_tiny": 18, "swin_t": 12}[name]
    for site in found:
        base, ours, fused = (site.forms[form] for form in ("base", "ours", "ours, fused"))
        assert fused.forward.bytes <= ours.forward.bytes == base.forward.bytes > 0, site.name
        assert fused.backward.bytes <= ours.backward.bytes <= base.backward.bytes, site.name
        assert ours.kept <= base.kept < site.forms["published"].kept, site.name
        assert (fused.forward.calls, fused.backward.calls) == (1, 1), site.name
        assert site.forms["published"].both.bytes > base.both.bytes, site.name
    # Not at any site: where a sum goes into a norm and nowhere else, its two terms are kept in the place of it.
    assert found.total["ours, fused"].kept <= found.total["base"].kept


def test_kept_bytes_leave_out_what_only_a_step_needed():
    x = torch.rand(100, requires_grad=True)
    assert kept_bytes(lambda: torch.where(x.abs() < 0.5, torch.zeros(()), x)) == 100  # the mask; abs had kept x
    assert kept_bytes(lambda: (x * x, x.exp())) == 800
    assert kept_bytes(lambda: (x * x, x.exp()), [x]) == 400
    assert kept_bytes(lambda: x.detach() * 2) == 0


def test_tally_counts_no_views_and_no_allocations():
    x = torch.rand(3, 4)
    with Tally() as tally:
        x.t().reshape(3, 4).view(2, 6)  # a transposed tensor is copied once
        torch.empty_like(x)
    assert (tally.calls, tally.read, tally.written) == (1, 48, 48)
    with Tally(smallest=12) as tally:
        x + torch.ones(4)
        x.sum()
    assert (tally.calls, tally.read, tally.written) == (3, 96, 48)
