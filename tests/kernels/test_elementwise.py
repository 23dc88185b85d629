"""The fused kernels against a float64 oracle that shares no code with them: torch's operators and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meansparse_fx.kernels import layout as layouts
from meansparse_fx.kernels import reference
from meansparse_fx.kernels.device_activations import ACTIVATIONS, activation_constexprs
from meansparse_fx.kernels.records import Options, Vectors

from . import calls

# Relative and absolute; half precision is rounded once, so within half a unit in the last place. A whole unit for
# bfloat16 under the interpreter, which truncates.
BFLOAT16 = 4e-3 if torch.cuda.is_available() else 8e-3
TOLERANCES = {torch.float32: (2e-6, 1e-6), torch.float16: (5e-4, 1e-6), torch.bfloat16: (BFLOAT16, 1e-6)}

ORACLE = {
    "identity": lambda s, w: s,
    "relu": lambda s, w: F.relu(s),
    "relu6": lambda s, w: F.relu6(s),
    "leaky_relu": lambda s, w, slope: F.leaky_relu(s, slope),
    "prelu": lambda s, w: torch.where(s > 0, s, w * s),
    "elu": lambda s, w, alpha: F.elu(s, alpha),
    "gelu": lambda s, w: F.gelu(s),
    "gelu_tanh": lambda s, w: F.gelu(s, approximate="tanh"),
    "silu": lambda s, w: F.silu(s),
    "swish": lambda s, w: s * torch.sigmoid(s),
    "hardswish": lambda s, w: F.hardswish(s),
    "mish": lambda s, w: F.mish(s),
    "softplus": lambda s, w, beta, limit: F.softplus(s, beta, limit),
    "psilu": lambda s, w: s * torch.sigmoid(w * s),
    "pssilu": lambda s, w, b: s * (torch.sigmoid(w * s) - b) / (1 - b),
}
CONSTANTS = {"leaky_relu": (0.1,), "elu": (1.3,), "softplus": (2.0, 20.0), "pssilu": (0.2,)}
LEARNED = ("prelu", "psilu", "pssilu")
KINKS = (-3.0, 0.0, 3.0, 6.0)

LAYOUTS = {
    "contiguous": (lambda x: x, 1),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), 1),
    "tokens": (lambda x: x.permute(0, 2, 3, 1).contiguous(), 3),
    "channels_outermost": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), 1),
    "channel_slice": (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], 1),
    "token_slice": (lambda x: torch.cat([x, x], 2).permute(0, 2, 3, 1).contiguous()[:, : x.shape[2]], 3),
    "crop": (lambda x: F.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2], 1),
    "every_other": (lambda x: x.repeat_interleave(2, 3)[..., ::2], 1),
    "expanded": (lambda x: x[:1].expand(x.shape), 1),
    "one_channel_of_many": (lambda x: x[:, 1:2], 1),
}


def inputs(shape, channel_dim, dtype, device, seed=0):
    """x, centre, threshold and weight, with x moved off the band's edges and the activations' kinks."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[channel_dim]
    along = [channels if d == channel_dim else 1 for d in range(len(shape))]
    centre = torch.randn(channels, generator=g) * 0.5
    threshold = torch.rand(channels, generator=g) * 1.5
    threshold[::3] = -1.0
    x = (torch.randn(shape, generator=g) * 3).to(dtype)
    for _ in range(2):
        wide = x.float()
        near = ((wide - centre.view(along)).abs() - threshold.view(along)).abs() < 0.03
        for kink in KINKS:
            near |= (wide - kink).abs() < 0.03
        x = torch.where(near, wide + 0.11, wide).to(dtype)
    weight = torch.rand(channels, generator=g) + 0.1
    return tuple(t.to(device) for t in (x, centre, threshold, weight))


def gate(x, centre, threshold, steepness):
    soft = centre + (x - centre) * torch.sigmoid(steepness * ((x - centre).abs() / threshold - 1))
    return torch.where(threshold > 0, soft, x)


def oracle(x, vectors, options, grad_y):
    """y, grad_x and grad_weight in float64."""
    centre, threshold, weight, *_ = vectors
    channel_dim, activation, constants, variant, backward, steepness, backward_steepness, *_ = options
    along = [n if d == channel_dim else 1 for d, n in enumerate(x.shape)]
    x = x.double().clone().requires_grad_()
    centre, threshold = (v.double().view(along) for v in (centre, threshold))
    inside = (x - centre).abs() <= threshold
    if variant == "smooth":
        s = gate(x, centre, threshold, steepness)
    elif variant == "edge":
        s = torch.where(inside, centre + threshold * torch.where(x < centre, -1.0, 1.0), x)
    else:
        s = torch.where(inside, centre, x)
    if backward == "identity":
        s = x + (s - x).detach()
    elif backward == "smooth":
        soft = gate(x, centre, threshold, backward_steepness)
        s = soft + (s - soft).detach()
    slope = None if weight is None else weight.double().clone().requires_grad_()
    shaped = None if slope is None else slope.view([1] * x.dim() if slope.numel() == 1 else along)
    y = ORACLE[activation](s, shaped, *constants)
    wanted = [x] if slope is None else [x, slope]
    grads = torch.autograd.grad(y, wanted, grad_y.double())
    return y.detach(), grads[0], None if slope is None else grads[1]


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, **kwargs) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol, **kwargs)


def check(
    x, centre, threshold, weight, channel_dim, activation, variant="mean", backward="exact", steepness=(4.0, 3.0)
):
    """Compare forward and backward with the oracle; returns y and the gradients."""
    if activation not in LEARNED:
        weight = None
    vectors = Vectors(centre, threshold, weight)
    options = Options(channel_dim, activation, CONSTANTS.get(activation, ()), variant, backward, *steepness)
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    y = calls.forward(x, vectors, options)
    grads = calls.backward(grad_y, x, vectors, options)
    expected_y, expected_x, expected_weight = oracle(x, vectors, options, grad_y)
    assert y.dtype == grads.x.dtype == x.dtype
    assert y.stride() == grads.x.stride() == torch.empty_like(x).stride()
    assert_close(y, expected_y, x.dtype)
    # Of size 10 with the smooth gate's slope, so the absolute part counts relative to that.
    assert_close(grads.x.double() / 10, expected_x / 10, x.dtype)
    if weight is None or weight.numel() == 0:
        assert weight is None or grads.weight.numel() == 0
    else:
        size = 1 + x.numel() / weight.numel()  # of the sum
        torch.testing.assert_close(grads.weight.double() / size, expected_weight / size, rtol=0, atol=1e-6)
    return y, grads


def test_every_activation_has_a_kernel_and_an_oracle() -> None:
    assert list(reference.ACTIVATIONS) == list(ACTIVATIONS) == list(ORACLE)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activation(activation, dtype, name, device) -> None:
    x, *vectors = inputs((2, 5, 3, 7), 1, dtype, device)
    arrange, channel_dim = LAYOUTS[name]
    check(arrange(x), *vectors, channel_dim, activation)


def test_constants_that_are_not_given_are_torchs() -> None:
    defaults = {"leaky_relu": (0.01, 0.0), "elu": (1.0, 0.0), "softplus": (1.0, 20.0), "relu": (0.0, 0.0)}
    for name, expected in defaults.items():
        found = activation_constexprs(name, (), None)
        assert (found["A"], found["B"]) == expected
    found = activation_constexprs("softplus", (2.0,), None)
    assert (found["A"], found["B"]) == (2.0, 20.0)


MODES = list(itertools.product(("mean", "edge", "smooth"), ("exact", "identity", "smooth")))


@pytest.mark.parametrize(("variant", "backward"), MODES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mode(activation, variant, backward, device) -> None:
    turn = list(ACTIVATIONS).index(activation) + MODES.index((variant, backward))
    arrange, channel_dim = list(LAYOUTS.values())[turn % 3]  # every layout and mode meet over the activations
    x, *vectors = inputs((2, 4, 3, 3), 1, torch.float32, device, seed=turn)
    check(arrange(x), *vectors, channel_dim, activation, variant, backward)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layout(name, dtype, device) -> None:
    x, *vectors = inputs((3, 6, 5, 7), 1, dtype, device)
    arrange, channel_dim = LAYOUTS[name]
    x = arrange(x)
    channels = x.shape[channel_dim]
    check(x, *(v[:channels] for v in vectors), channel_dim, "psilu", "mean", "smooth")


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "tokens", "channel_slice"])
def test_offsets_of_64_bits(name, device, monkeypatch) -> None:
    monkeypatch.setattr(layouts, "INT32_ELEMENTS", 0)
    layouts.layout_of.cache_clear()
    x, *vectors = inputs((2, 4, 3, 5), 1, torch.float32, device)
    arrange, channel_dim = LAYOUTS[name]
    check(arrange(x), *vectors, channel_dim, "prelu")
    layouts.layout_of.cache_clear()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (1, 3, 1), (5, 1, 1), (1, 1, 5)])
def test_sizes_zero_and_one(shape, device) -> None:
    x, *vectors = inputs(shape, 1, torch.float32, device)
    check(x, *vectors, 1, "prelu")


@pytest.mark.parametrize("shape", [(3, 4100), (2, 70, 60), (1, 3, 2300), (40, 33)])
def test_more_than_one_tile(shape, device) -> None:
    x, *vectors = inputs(shape, 1, torch.float32, device)
    check(x, *vectors, 1, "prelu")


def test_shared_slope(device) -> None:
    x, centre, threshold, weight = inputs((3, 5, 4, 4), 1, torch.float32, device)
    _, grads = check(x, centre, threshold, weight[:1], 1, "prelu")
    assert grads.weight.shape == (1,)


@st.composite
def strided(draw):
    """A tensor of 1 to 4 dimensions, permuted, sliced and expanded at will, and its channel dimension."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    stored = [n * step for n, step in zip(shape, steps, strict=True)]
    order = draw(st.permutations(range(len(shape))))
    x = torch.empty([stored[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    x = x[tuple(slice(None, None, step) for step in steps)]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(shape) - 1))
        x = x.narrow(at, 0, 1).expand(x.shape)
    return x, draw(st.integers(0, len(shape) - 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=strided())
def test_any_strides(device, drawn) -> None:
    x, channel_dim = drawn
    values, *vectors = inputs(x.shape, channel_dim, torch.float32, device)
    x = x.to(device)
    if 0 in x.stride():  # one value along an expanded dimension
        at = x.stride().index(0)
        values = values.narrow(at, 0, 1)
        x.narrow(at, 0, 1).copy_(values)
    else:
        x.copy_(values)
    check(x, *vectors, channel_dim, "silu", backward="identity" if 0 in x.stride() else "exact")


INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1e30, -1e30, 88.0, -88.0, 1e-40, -1e-40])

# Of each activation its limits at infinity and at minus infinity, with the constants above and a slope of 0.25. In a
# table, because torch's own vectorised functions return NaN there on some processors and the limit on others.
LIMITS = {
    "identity": (INF, -INF),
    "relu": (INF, 0.0),
    "relu6": (6.0, 0.0),
    "leaky_relu": (INF, -INF),
    "prelu": (INF, -INF),
    "elu": (INF, -1.3),
    "gelu": (INF, 0.0),
    "gelu_tanh": (INF, 0.0),
    "silu": (INF, 0.0),
    "swish": (INF, 0.0),
    "hardswish": (INF, 0.0),
    "mish": (INF, 0.0),
    "softplus": (INF, 0.0),
    "psilu": (INF, 0.0),
    "pssilu": (INF, INF),
}


@pytest.mark.parametrize("threshold", [-1.0, 0.5])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_special_values(activation, threshold, device) -> None:
    """NaN stays, infinity goes to the limit, everything finite is as the float64 oracle says."""
    x, grad = SPECIAL.view(-1, 1).to(device), torch.ones(len(SPECIAL), 1, device=device)
    weight = torch.tensor([0.25], device=device) if activation in LEARNED else None
    constants = CONSTANTS.get(activation, ())
    vectors = Vectors(torch.zeros(1, device=device), torch.full((1,), threshold, device=device), weight)
    options = Options(1, activation, constants)
    got = calls.forward(x, vectors, options)
    assert got[0].isnan()
    assert got[1:3].flatten().tolist() == pytest.approx(LIMITS[activation])
    leaf = x[3:].double().requires_grad_()
    s = torch.where(leaf.detach().abs() <= threshold, 0.0, leaf)
    expected = ORACLE[activation](s, None if weight is None else weight.double(), *constants)
    torch.testing.assert_close(got[3:].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    grad_x = calls.backward(grad, x, vectors, options).x
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad[3:].double())
    torch.testing.assert_close(grad_x[3:].double(), expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["mean", "edge", "smooth"])
def test_nan_and_infinity_are_never_inside(variant, device) -> None:
    x = torch.tensor([[float("nan")], [float("inf")], [float("-inf")]], device=device)
    ones = torch.ones(1, device=device)
    for threshold in (ones, torch.full_like(ones, 3e38), -ones):
        y = calls.forward(x, Vectors(ones, threshold), Options(1, variant=variant))
        torch.testing.assert_close(y, x, equal_nan=True, rtol=0, atol=0)


def test_the_band_is_closed(device) -> None:
    x = torch.tensor([[0.75], [1.25], [0.5], [1.5], [1.0]], device=device)
    band = Vectors(torch.tensor([1.0], device=device), torch.tensor([0.25], device=device))
    y = calls.forward(x, band, Options(1))
    assert y.flatten().tolist() == [1.0, 1.0, 0.5, 1.5, 1.0]
    edge = calls.forward(x, band, Options(1, variant="edge"))
    assert edge.flatten().tolist() == [0.75, 1.25, 0.5, 1.5, 1.25]
    grad = calls.backward(torch.ones_like(x), x, band, Options(1)).x
    assert grad.flatten().tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_gelu_over_its_whole_range(device) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(1, 38, 200), -torch.logspace(1, 38, 200)])
    x = x.view(-1, 1).to(device)
    none = -torch.ones(1, device=device)
    y = calls.forward(x, Vectors(none, none), Options(1, "gelu"))
    torch.testing.assert_close(y.double(), F.gelu(x.double()), rtol=3e-7, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_float64_is_left_to_the_reference(device) -> None:
    x, vector = torch.zeros(2, 3, dtype=torch.float64, device=device), torch.zeros(3, device=device)
    with pytest.raises(TypeError, match="float64"):
        calls.forward(x, Vectors(vector, vector), Options(1))


def test_vectors_of_another_size_are_refused(device) -> None:
    x, vector = torch.zeros(2, 3, device=device), torch.zeros(3, device=device)
    with pytest.raises(ValueError, match="threshold has 2 elements for 3 channels"):
        calls.forward(x, Vectors(vector, vector[:2]), Options(1))
