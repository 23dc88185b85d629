"""Derivatives of every kind and order, against the base where the band is empty, numerical ones elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import meansparse_fx as msfx
from meansparse_fx.kernels import ops, reference
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors

# Printed by torch's own import of its rules for forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

CHANNELS = 3
LEARNED = ("prelu", "psilu", "pssilu")
KINKS = torch.tensor([0.0, 6.0, -3.0, 3.0], dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operator(activation, threshold, variant="mean", backward="exact", **vectors):
    """Return the operator and a slope for it, with a band of the given half width."""
    constants = tuple(default for _, default in reference.ACTIVATIONS[activation].constants)
    weight = torch.linspace(0.2, 0.9, CHANNELS, dtype=torch.float64) if activation in LEARNED else None
    band = normal(1, CHANNELS) / 4, torch.full((CHANNELS,), threshold, dtype=torch.float64)
    want_sum = vectors.pop("want_sum", False)
    options = Options(1, activation, constants, variant, backward, 3.0, 2.0, want_sum)
    return Operator(Vectors(*band, weight, **vectors), options)


def smooth_point(own, seed=0):
    """Return an x that is near no edge of the band and no kink of an activation."""
    x = normal(seed, 2, CHANNELS, 2) * 2
    centre, threshold = (v.view(1, -1, 1) for v in own.vectors[:2])
    for _ in range(3):
        near = ((x - centre).abs() - threshold.abs()).abs() < 0.02
        x = torch.where(near | ((x[..., None] - KINKS).abs() < 0.02).any(-1), x + 0.05, x)
    return x


@pytest.mark.parametrize("threshold", [-1.0, 0.5])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_first_and_second_order_are_the_numerical_ones(activation, threshold):
    own = operator(activation, threshold)
    x = smooth_point(own).requires_grad_()
    assert torch.autograd.gradcheck(own, (x,), eps=1e-7, atol=1e-5, check_forward_ad=True, check_batched_grad=True)
    if activation != "hardswish":  # whose second derivative torch takes from one side alone
        assert torch.autograd.gradgradcheck(own, (x,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("activation", LEARNED)
def test_derivatives_by_a_learned_slope_are_the_numerical_ones(activation):
    own = operator(activation, 0.5)
    x, weight = smooth_point(own).requires_grad_(), own.vectors.weight.requires_grad_()

    def call(x, weight):
        return Operator(own.vectors._replace(weight=weight), own.options)(x)

    once, again = (torch.autograd.grad(call(x, weight).sum(), (x, weight), create_graph=g) for g in (False, True))
    torch.testing.assert_close(once, again)
    assert torch.autograd.gradcheck(call, (x, weight), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(call, (x, weight), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("changed", ["x", "residual", "weight"])
def test_what_backward_reads_must_not_change_before(changed):
    """As torch's own activations have it."""
    own = operator("prelu", 0.5)
    x, residual, weight = normal(0, 2, CHANNELS, 2), normal(1, 2, CHANNELS, 2), own.vectors.weight
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = own(x, residual if changed == "residual" else None)
    with torch.no_grad():
        {"x": x, "residual": residual, "weight": weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), leaves)


@pytest.mark.parametrize("choice", [None, "composition"])
@pytest.mark.parametrize("alone", ["x", "residual", "shortcut", "weight"])
def test_what_alone_wants_a_gradient_gets_it(alone, choice):
    own = operator("prelu", 0.5)
    own = Operator(own.vectors, own.options, choice)
    x, residual, shortcut = (normal(seed, 2, CHANNELS, 2) for seed in range(3))
    leaf = {"x": x, "residual": residual, "shortcut": shortcut, "weight": own.vectors.weight}[alone].requires_grad_()
    results = own(x, residual, shortcut), reference.operator(x, residual, shortcut, own.vectors, own.options)[0]
    found, expected = (torch.autograd.grad(y.square().sum(), leaf) for y in results)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("backward", reference.BACKWARDS)
def test_gradients_of_gradients_of_every_mode_are_the_references(variant, backward):
    own = operator("silu", 0.5, variant, backward)
    x, upstream, other = smooth_point(own), normal(5, 2, CHANNELS, 2), normal(6, 2, CHANNELS, 2)
    found = []
    for call in (own, lambda v: reference.operator(v, None, None, own.vectors, own.options)[0]):
        leaf, u = x.clone().requires_grad_(), upstream.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf), leaf, u, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad((first * other).sum(), (leaf, u))))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("want_sum", [False, True])
def test_gradients_of_gradients_with_what_stands_around(want_sum):
    """The residual is made of x, so that its path must not be counted as x's."""
    names = ("input_mean", "input_variance", "input_weight", "input_bias", "layer_scale")
    names += ("sum_mean", "sum_variance", "sum_weight", "sum_bias")
    around = {n: normal(i, CHANNELS) + 1 for i, n in enumerate(names, 10)}
    around |= {n: around[n].square() + 0.1 for n in names if n.endswith("variance")}
    own = operator("gelu", 0.4, want_sum=want_sum, **around)
    other = normal(6, 2, CHANNELS, 2)
    found = []
    for call in (own, lambda *t: reference.operator(*t, own.vectors, own.options)[: 1 + want_sum]):
        x = normal(3, 2, CHANNELS, 2).requires_grad_()
        results = call(x, x.sin(), x.cos())
        total = sum(r.square().sum() for r in (results if isinstance(results, tuple) else (results,)))
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        found.append((first.detach(), torch.autograd.grad((first * other).sum(), x)[0]))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu"])
def test_transforms_at_alpha_zero_are_the_bases(activation):
    own = operator(activation, -1.0)
    weight = own.vectors.weight
    base = {"relu": F.relu, "gelu": F.gelu, "prelu": lambda v: F.prelu(v, weight)}[activation]
    x, tangent = normal(0, 2, CHANNELS, 2), normal(1, 2, CHANNELS, 2)

    def total(f):
        return lambda v: f(v).pow(3).sum()

    for transform in (
        lambda f: jvp(f, (x,), (tangent,)),
        lambda f: vjp(f, x)[1](tangent)[0],
        lambda f: jacrev(f)(x),
        lambda f: jacfwd(f)(x),
        lambda f: hessian(total(f))(x),
        lambda f: vmap(grad(lambda v: total(f)(v[None])))(x),
        lambda f: jvp(grad(total(f)), (x,), (tangent,)),
    ):
        torch.testing.assert_close(transform(own), transform(base))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(*(forward_ad.unpack_dual(f(dual)).tangent for f in (own, base)))


@pytest.fixture
def models():
    """A small network, transformed at alpha 0, in float64."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(64, 3)).double().eval()
    images = normal(2, 2, 3, 8, 8)
    return net, msfx.transform(net, images), images


def test_a_gradient_penalty_reaches_the_weights(models):
    net, sparse, images = models
    found = []
    for model in (net, sparse):
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
        weight = model.get_parameter("0.weight")
        found.append(torch.autograd.grad(g.square().sum(), weight)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0])


def test_checkpointing_keeps_gradients(models):
    net, sparse, images = models
    found = []
    for call in (net, sparse, lambda v: checkpoint(sparse, v, use_reentrant=False)):
        x = images.clone().requires_grad_()
        found.append(torch.autograd.grad(call(x).logsumexp(1).sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])
    assert torch.equal(found[2], found[1])


def test_per_sample_gradients_of_the_weights(models):
    net, sparse, images = models

    def per_sample(model):
        def loss(weights, image):
            return functional_call(model, weights, (image[None],)).logsumexp(1).sum()

        return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), images)

    torch.testing.assert_close(per_sample(sparse), per_sample(net))


def test_a_subclass_keeps_its_type():
    class Tagged(torch.Tensor):
        pass

    own = operator("gelu", 0.5)
    x = normal(0, 2, CHANNELS, 2)
    y = own(x.as_subclass(Tagged))
    assert type(y) is Tagged
    assert torch.equal(y.as_subclass(torch.Tensor), own(x))


def test_the_default_device_is_no_observer(monkeypatch):
    own, ran = operator("gelu", 0.5), []
    run = Operator.forward
    monkeypatch.setattr(Operator, "forward", lambda *a: (ran.append(1), run(*a))[1])
    with torch.device("cpu"):
        own(normal(0, 2, CHANNELS, 2))
    assert ran


def test_the_backwards_steepness_moves_no_value():
    x, band = normal(0, 4, CHANNELS), (torch.zeros(CHANNELS), torch.ones(CHANNELS))
    for variant in reference.VARIANTS:
        leaf = x.clone().requires_grad_()
        call = [
            ops.mean_sparse(leaf, *band, 1, "gelu", (), None, variant, "smooth", 5.0, steepness)
            for steepness in (1.0, 20.0)
        ]
        assert torch.equal(*call)
        grads = [torch.autograd.grad(y.sum(), leaf)[0] for y in call]
        assert not torch.allclose(*grads)
