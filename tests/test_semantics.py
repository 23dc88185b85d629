"""The reference and the eager operator against definitions written out by hand in NumPy and torch float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meansparse_fx.kernels import ops, reference
from tests.models import mean_sparse

# The oracle: each activation from its own textbook formula, in float64 NumPy.
SHIFT = 0.15
ERF = np.vectorize(math.erf)
FORMULAS = {
    "identity": lambda s: s,
    "relu": lambda s: np.maximum(s, 0),
    "relu6": lambda s: np.clip(s, 0, 6),
    "leaky_relu": lambda s: np.where(s > 0, s, 0.01 * s),
    "prelu": lambda s, w: np.where(s > 0, s, w * s),
    "elu": lambda s: np.where(s > 0, s, np.expm1(np.minimum(s, 0))),
    "gelu": lambda s: s * 0.5 * (1 + ERF(s / math.sqrt(2))),
    "gelu_tanh": lambda s: 0.5 * s * (1 + np.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3))),
    "silu": lambda s: s / (1 + np.exp(-s)),
    "swish": lambda s: s / (1 + np.exp(-s)),
    "hardswish": lambda s: s * np.clip(s + 3, 0, 6) / 6,
    "mish": lambda s: s * np.tanh(np.log1p(np.exp(s))),
    "softplus": lambda s: np.log1p(np.exp(s)),
    "psilu": lambda s, w: s / (1 + np.exp(-w * s)),
    "pssilu": lambda s, w: s * (1 / (1 + np.exp(-w * s)) - SHIFT) / (1 - SHIFT),
}
SLOPED = ("prelu", "psilu", "pssilu")
CHANNELS = 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def sample(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, CHANNELS, 4, 2, generator=g, dtype=torch.float64).mul_(2).to(dtype)
    centre = torch.randn(CHANNELS, generator=g, dtype=torch.float64)
    threshold = torch.rand(CHANNELS, generator=g, dtype=torch.float64)
    threshold[2] = -1.0
    return x, centre, threshold


def arguments(name):
    constants = tuple(default for _, default in reference.ACTIVATIONS[name].constants)
    if name == "pssilu":
        constants = (SHIFT,)
    weight = torch.linspace(0.1, 1.5, CHANNELS, dtype=torch.float64) if name in SLOPED else None
    return constants, weight


def by_hand(x, centre, threshold, name, weight):
    """Return the operator element by element, in Python's own arithmetic."""
    x = x.double().numpy()
    s = x.copy()
    for index in np.ndindex(*x.shape):
        c = index[1]
        if abs(x[index] - float(centre[c])) <= float(threshold[c]):
            s[index] = float(centre[c])
    return FORMULAS[name](s) if weight is None else FORMULAS[name](s, weight.numpy().reshape(1, -1, 1, 1))


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "entry", [ops.mean_sparse, mean_sparse, ops.composed], ids=["operator", "reference", "composed"]
)
def test_forward_is_the_definition(entry, name, dtype):
    x, centre, threshold = sample(dtype)
    if dtype != torch.float64:
        centre, threshold = centre.float(), threshold.float()
    constants, weight = arguments(name)
    y = entry(x, centre, threshold, 1, name, constants, weight)
    assert y.dtype == dtype
    expected = by_hand(x, centre, threshold, name, weight)
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("variant", reference.VARIANTS)
@pytest.mark.parametrize("backward", reference.BACKWARDS)
@pytest.mark.parametrize("entry", [ops.mean_sparse, ops.composed], ids=["operator", "composed"])
def test_lowerings_and_reference_agree(entry, name, variant, backward):
    x, centre, threshold = sample()
    # The edges of the band, and the kink most activations have.
    x[0, :, 0, 0], x[1, :, 0, 0] = centre + threshold, centre - threshold
    x[2, :, 0, 0] = 0.0
    constants, weight = arguments(name)
    leaves = [x.requires_grad_()] + ([weight.requires_grad_()] if weight is not None else [])
    y, expected = (
        form(x, centre, threshold, 1, name, constants, weight, variant, backward) for form in (entry, mean_sparse)
    )
    assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    for own, ref in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(own, ref, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward", reference.BACKWARDS)
@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_forward_never_depends_on_backward(variant, backward):
    x, centre, threshold = sample()
    y, exact = (ops.mean_sparse(x, centre, threshold, 1, "gelu", (), None, variant, b) for b in (backward, "exact"))
    assert torch.equal(y, exact)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("variant", ["mean", "smooth"])
def test_exact_backward_is_the_numerical_derivative(name, variant):
    x, centre, threshold = sample()
    # Finite differences mean nothing across the band's edge, nor at a kink of the activation.
    kinks = torch.tensor([0.0, 6.0, -3.0, 3.0], dtype=torch.float64)
    edge = ((x - centre.view(1, -1, 1, 1)).abs() - threshold.view(1, -1, 1, 1)).abs()
    near = (edge < 1e-3) | ((x[..., None] - kinks).abs() < 1e-3).any(-1)
    x = torch.where(near, x + 0.01, x).requires_grad_()
    constants, weight = arguments(name)
    assert torch.autograd.gradcheck(
        lambda v: ops.mean_sparse(v, centre, threshold, 1, name, constants, weight, variant), (x,), eps=1e-7, atol=1e-5
    )


def test_backward_modes_differ_only_inside_the_band():
    x, centre, threshold = sample()
    inside = reference.inside_band(x, *(reference.per_channel(v, 4, 1) for v in (centre, threshold)))
    grads = {}
    for mode in ("exact", "identity"):
        leaf = x.clone().requires_grad_()
        ops.mean_sparse(leaf, centre, threshold, 1, "silu", backward=mode).sum().backward()
        grads[mode] = leaf.grad
    assert 0 < int(inside.sum()) < x.numel()
    assert torch.equal(grads["exact"][~inside], grads["identity"][~inside])
    assert not grads["exact"][inside].any()
    # Inside, the identity hands on the activation's slope at the centre (BPDA).
    c = reference.per_channel(centre, 4, 1).expand_as(x).clone().requires_grad_()
    F.silu(c).sum().backward()
    assert torch.equal(grads["identity"][inside], c.grad[inside])


def test_edge_variant_snaps_to_the_nearer_edge():
    x = torch.tensor([[-0.3, -0.1, 0.0, 0.2, 0.9]])
    y = ops.mean_sparse(x, torch.zeros(1), torch.tensor([0.25]), 0, variant="edge")
    assert y[0].tolist() == pytest.approx([-0.3, -0.25, 0.25, 0.25, 0.9])


def test_the_band_is_closed():
    x = torch.tensor([[0.5, -0.5, math.nextafter(0.5, 1)]], dtype=torch.float64)
    y = ops.mean_sparse(x, torch.zeros(1).double(), torch.tensor([0.5]).double(), 0)
    assert y.tolist() == [[0.0, 0.0, math.nextafter(0.5, 1)]]


@pytest.mark.parametrize("name", sorted(set(reference.ACTIVATIONS) - set(SLOPED)))
@pytest.mark.parametrize("backward", reference.BACKWARDS)
@pytest.mark.parametrize("threshold", [-1.0, 0.3])
@pytest.mark.parametrize("entry", [ops.mean_sparse, ops.composed], ids=["operator", "composed"])
def test_special_values_pass_as_in_the_activation(entry, name, backward, threshold):
    x = torch.tensor([[math.nan, math.inf, -math.inf, -0.0]])
    constants, _ = arguments(name)
    y = entry(x, torch.full((1,), 5.0), torch.full((1,), threshold), 0, name, constants, backward=backward)
    expected = reference.ACTIVATIONS[name].forward(x, *constants)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "hardswish"])
def test_negative_threshold_is_the_activation_bit_for_bit(name):
    x = torch.randn(4, 7, 6, 6).requires_grad_()
    y = ops.mean_sparse(x, torch.randn(7), torch.full((7,), -1.0), 1, name)
    expected = getattr(F, name)(x)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, g)[0] for out in (y, expected)))


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    data=st.data(),
    format_=st.sampled_from(["contiguous", "channels_last", "permuted", "expanded", "strided"]),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_and_stride(shape, data, format_):
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = torch.randn(shape)
    if format_ == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif format_ == "permuted":
        x = x.permute(*reversed(range(x.dim())))
        dim = x.dim() - 1 - dim
    elif format_ == "expanded":
        x = x.unsqueeze(0).expand(2, *x.shape)
        dim += 1
    elif format_ == "strided":
        x = torch.randn([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
    c = x.shape[dim]
    centre, threshold = torch.randn(c), torch.rand(c) - 0.2
    y = ops.mean_sparse(x, centre, threshold, dim, "relu")
    expected = (
        torch.stack(
            [
                torch.where((s - m).abs() <= t, m, s).relu()
                for s, m, t in zip(x.unbind(dim), centre, threshold, strict=True)
            ]
            or [x.select(dim, 0)],
            dim,
        )
        if c
        else x.clone()
    )
    assert torch.equal(y, expected)
    if y.numel() > 1:  # the stride of a dimension of one element addresses nothing, and torch leaves it arbitrary
        strides = [
            (own, ref) for own, ref, n in zip(y.stride(), torch.empty_like(x).stride(), x.shape, strict=True) if n > 1
        ]
        assert all(own == ref for own, ref in strides)


@pytest.mark.parametrize("backward", ["exact", "identity"])
def test_backward_keeps_the_input_and_nothing_else_of_its_size(backward):
    x = torch.randn(4, 6, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.mean_sparse(x, torch.zeros(6), torch.ones(6), 1, "gelu", backward=backward)
    assert [t.numel() for t in kept] == [x.numel()]


@pytest.mark.parametrize("backward", ["exact", "identity"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", [ops.mean_sparse, ops.composed], ids=["operator", "composed"])
def test_a_relu_keeps_its_result_and_the_gradient_is_that_of_the_input(entry, dtype, backward):
    g = torch.Generator().manual_seed(3)
    # Few distinct values, so that many are the centre, a band's edge or zero once rounded to the dtype.
    x = (torch.randint(-12, 13, (64, 40), generator=g) / 8).to(dtype)
    centre = torch.linspace(-1.2, 1.2, 40, dtype=torch.float64).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    threshold = torch.tensor([0.0, 1e-9, 1e-3, 0.2, -1.0]).to(centre.dtype).repeat(8)
    x[0] = centre.to(dtype)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = entry(x, centre, threshold, 1, "relu", backward=backward)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [y.data_ptr()]
    upstream = torch.randn(x.shape, generator=g).to(dtype)
    wide, c, t = x.detach().double(), centre.double(), threshold.double()
    inside = (wide - c).abs() <= t
    slope = torch.where(inside, c, wide) > 0 if backward == "identity" else ~inside & (wide > 0)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], torch.where(slope, upstream, 0))


def test_a_band_that_changes_before_backward_is_refused():
    x, centre, threshold = sample()
    y = ops.mean_sparse(x.requires_grad_(), centre, threshold, 1, "gelu")
    threshold.mul_(2)
    with pytest.raises(RuntimeError, match="changed between a forward pass and its backward"):
        y.sum().backward()


def test_lowering_variable_is_checked(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "fast")
    with pytest.raises(ValueError, match="expected auto, triton or eager"):
        ops.lowering()


SPELLED = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
}
VIEWS = {
    "slice of channels": lambda x: x[:, 1:],
    "slice of permuted channels": lambda x: x.permute(0, 2, 3, 1)[..., 1:].permute(0, 3, 1, 2),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("activation", SPELLED)
def test_at_alpha_0_a_view_has_the_bits_of_the_base(activation, view, monkeypatch):
    """torch's vectorised loops round by how memory lies, and so they do for a gradient that is flat behind it."""
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    x = torch.randn(4, 4, 9, 9, generator=torch.Generator().manual_seed(0)) * 3
    centre, threshold = torch.zeros(3), -torch.ones(3)

    def run(act):
        leaf = x.clone().requires_grad_()
        y = act(VIEWS[view](leaf)).flatten(1)
        return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]

    ours = run(lambda u: ops.mean_sparse(u, centre, threshold, 1, activation, arguments(activation)[0]))
    base = run(SPELLED[activation])
    assert torch.equal(ours[0], base[0])
    assert torch.equal(ours[1], base[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_computed_has_the_features_type_whatever_the_vectors_have(dtype):
    x, vector = torch.rand(2, 3, 4, dtype=dtype), torch.rand(3, dtype=torch.float64)
    y = reference.scaled(reference.normed(x, (vector, vector.float(), None, vector), 0.5), vector.float(), 1)
    assert y.dtype == dtype
    vector = vector.numpy()[:, None]
    expected = ((x.numpy() - vector) / np.sqrt(vector + 0.5) + vector) * vector
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6, atol=1e-6)  # x - mean cancels
