"""Channel moments against float64 over layouts, types and hostile numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meansparse_fx.activations import ActivationCall
from meansparse_fx.kernels import layout as layouts
from meansparse_fx.kernels import moments as module
from meansparse_fx.kernels.ops import activation_moments, channel_moments
from meansparse_fx.observer import ChannelMoments

LAYOUTS = {
    "contiguous": (lambda x: x, 1),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), 1),
    "tokens": (lambda x: x.permute(0, 2, 3, 1).contiguous(), 3),
    "channels_outermost": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), 1),
    "channel_slice": (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], 1),
    "crop": (lambda x: F.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2], 1),
    "expanded": (lambda x: x[:1].expand(x.shape), 1),
}


@pytest.fixture(autouse=True)
def triton(monkeypatch) -> None:
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "triton")


@pytest.fixture(params=[1, 3, module.PROGRAMS], ids=lambda n: f"{n} programs")
def programs(request, monkeypatch) -> None:
    """Few programs walk many tiles each; many merge many parts."""
    monkeypatch.setattr(module, "PROGRAMS", request.param)


def sample(shape, dtype, device, offset=0.0):
    g = torch.Generator().manual_seed(0)
    return (
        (torch.randn(shape, generator=g) * torch.linspace(0.5, 2, shape[1]).view(-1, 1, 1) + offset)
        .to(dtype)
        .to(device)
    )


def check(got, x, channel_dim, rtol=2e-6) -> None:
    """Compare with float64; the mean relative to the deviation, since that is what a band is measured in."""
    wide = x.double().movedim(channel_dim, 0).flatten(1)
    count = x.numel() // x.shape[channel_dim]
    mean = wide.mean(1)
    m2 = (wide - mean[:, None]).square().sum(1)
    got_count, got_mean, got_m2 = got
    assert got_count == count
    assert got_mean.dtype == got_m2.dtype == torch.float64
    deviation = (m2 / count).sqrt().clamp_min(1e-12)
    torch.testing.assert_close((got_mean - mean) / deviation, torch.zeros_like(mean), rtol=0, atol=rtol)
    torch.testing.assert_close(got_m2, m2, rtol=rtol, atol=1e-12)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_moments(name, dtype, device) -> None:
    arrange, channel_dim = LAYOUTS[name]
    x = arrange(sample((3, 6, 5, 7), dtype, device))
    check(channel_moments(x, channel_dim), x, channel_dim)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_many_tiles(name, device, monkeypatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS", 8)
    x = LAYOUTS[name][0](sample((2, 70, 30, 17), torch.float32, device, offset=10))
    check(channel_moments(x, 1), x, 1)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_mean_costs_no_digits(offset, name, device) -> None:
    x = LAYOUTS[name][0](sample((3, 5, 6, 7), torch.float32, device, offset=offset))
    check(channel_moments(x, 1), x, 1)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_a_first_element_far_from_all_others(name, device) -> None:
    x = sample((3, 5, 6, 7), torch.float32, device, offset=1e4)
    x[0, :, 0, 0] = 0
    x = LAYOUTS[name][0](x)
    check(channel_moments(x, 1), x, 1)


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_constant_channels_have_no_deviation(name, device) -> None:
    x = LAYOUTS[name][0](torch.full((3, 5, 6, 7), 0.1, device=device))
    _, mean, m2 = channel_moments(x, 1)
    assert m2.tolist() == [0.0] * 5
    assert mean.tolist() == [float(torch.tensor(0.1))] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [(0, 2, 0, 0), (2, 2, 3, 4)])
def test_non_finite_values_stay_in_their_channel(at, bad, device) -> None:
    x = sample((3, 5, 6, 7), torch.float32, device)
    x[at] = bad
    for arrange in (lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last)):
        for found in channel_moments(arrange(x), 1)[1:]:
            assert found.isfinite().tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 8])
def test_a_first_tile_unlike_all_others(programs, name, device, monkeypatch) -> None:
    """A black image first, and all others far from it by many of their own deviations: M2 loses four bits at most."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    x = sample((40, 3, 16, 16), torch.float32, device, offset=30)
    x[0] = 0
    check(channel_moments(LAYOUTS[name][0](x), 1), x, 1, rtol=1e-5)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_fused_activation(name, device) -> None:
    arrange, channel_dim = LAYOUTS[name]
    x = arrange(sample((3, 6, 5, 7), torch.float32, device))
    y, got = activation_moments(x, channel_dim, "leaky_relu", (0.1,))
    torch.testing.assert_close(y, F.leaky_relu(x, 0.1))
    assert y.stride() == torch.empty_like(x).stride()
    check(got, x, channel_dim)


def test_fused_learned_slope(device) -> None:
    x, weight = sample((3, 6, 5, 7), torch.float32, device), torch.rand(6, device=device)
    y, _ = activation_moments(x, 1, "prelu", (), weight)
    torch.testing.assert_close(y, F.prelu(x, weight))


def test_offsets_of_64_bits(device, monkeypatch) -> None:
    monkeypatch.setattr(layouts, "INT32_ELEMENTS", 0)
    module.tiles_of.cache_clear()
    for arrange, channel_dim in list(LAYOUTS.values())[:3]:
        x = arrange(sample((3, 6, 5, 7), torch.float32, device))
        check(channel_moments(x, channel_dim), x, channel_dim)
    module.tiles_of.cache_clear()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (1, 1, 1), (1, 3, 1), (5, 1, 1), (1, 1, 5)])
def test_sizes_zero_and_one(shape, device) -> None:
    x = torch.ones(shape, device=device)
    count, mean, m2 = channel_moments(x, 1)
    assert count == shape[0] * shape[2]
    assert mean.tolist() == [1.0 if count else 0.0] * shape[1]
    assert m2.tolist() == [0.0] * shape[1]


def test_twice_the_same_bits(device) -> None:
    x = sample((2, 5, 30, 31), torch.float32, device)
    first, second = channel_moments(x, 1), channel_moments(x, 1)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 9)] * 4), order=st.permutations(range(4)), channel_dim=st.integers(0, 3))
def test_any_shape(device, shape, order, channel_dim) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).permute(order)
    check(channel_moments(x, channel_dim), x, channel_dim)


def test_observers_on_a_gpu_read_once(device) -> None:
    """The operator that observers call: the kernel's activation and moments, not torch's."""
    x = sample((3, 6, 5, 7), torch.float32, device)
    observer = ChannelMoments("site", 6, 1, ActivationCall("leaky_relu", (0.1,)))
    expected, moments = activation_moments(x, 1, "leaky_relu", (0.1,))
    assert torch.equal(observer(x), expected)
    assert torch.equal(observer.latest.mean, moments[1])
    check((observer.latest.count, observer.latest.mean, observer.latest.m2), x, 1)
