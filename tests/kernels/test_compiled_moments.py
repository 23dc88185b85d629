"""The CPU's channel moments against a float64 oracle in NumPy, on numbers that cost a careless sum its digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meansparse_fx.kernels import compiled, compiled_moments, ops

pytestmark = [
    pytest.mark.slow,  # compiles
    pytest.mark.skipif(not compiled.available(), reason="no C++ compiler"),
]

LAYOUTS = {
    "contiguous": (lambda x: x, 1),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), 1),
    "tokens": (lambda x: x.permute(0, 2, 3, 1).contiguous(), 3),
}


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "auto")


def check(x: torch.Tensor, channel_dim: int) -> None:
    """Compare with two passes over long doubles; the mean in units of the deviation, which a band is measured in."""
    assert compiled_moments.takes(x, channel_dim)
    wide = x.double().movedim(channel_dim, 0).flatten(1).numpy().astype(np.longdouble)
    mean = wide.mean(1)
    m2 = np.square(wide - mean[:, None]).sum(1)
    std = np.maximum(np.sqrt(m2 / wide.shape[1]), np.finfo(np.float64).tiny)
    count, got_mean, got_m2 = ops.channel_moments(x, channel_dim)
    assert count == wide.shape[1]
    assert got_mean.dtype == got_m2.dtype == torch.float64
    # float64 rounds a mean to 1e-16 of its size; sums of some thousand terms to 1e-12 of theirs.
    assert (np.abs(got_mean.numpy() - mean) <= 1e-12 * std + 4e-16 * np.abs(mean)).all()
    np.testing.assert_allclose(got_m2.numpy(), m2.astype(np.float64), rtol=1e-10)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layouts_and_types(layout, dtype):
    arrange, channel_dim = LAYOUTS[layout]
    for shape in ((8, 6, 17, 19), (70, 6, 4, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1
        check(arrange(x.to(dtype)), channel_dim)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_costs_no_digits(layout):
    arrange, channel_dim = LAYOUTS[layout]
    x = torch.randn(16, 6, 17, 19, generator=torch.Generator().manual_seed(0))
    check(arrange(x + torch.tensor([0, 1, -1e3, 1e5, -1e6, 1e7]).view(-1, 1, 1)), channel_dim)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("outlier", [0.0, 1e9, -1e30])
def test_a_first_element_far_from_all_others(layout, outlier):
    arrange, channel_dim = LAYOUTS[layout]
    x = torch.randn(16, 6, 17, 19, generator=torch.Generator().manual_seed(0)) + 1e4
    x[0, :, 0, 0] = outlier
    check(arrange(x), channel_dim)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_and_non_finite_channels(layout):
    arrange, channel_dim = LAYOUTS[layout]
    x = torch.full((16, 6, 17, 19), 0.1)
    x[3, 2, 4, 4], x[0, 3, 0, 0], x[15, 4, 16, 18] = float("nan"), float("inf"), float("-inf")
    _, mean, m2 = ops.channel_moments(arrange(x), channel_dim)
    assert mean.isfinite().tolist() == m2.isfinite().tolist() == [True, True, False, False, False, True]
    assert m2[[0, 1, 5]].tolist() == [0.0] * 3
    assert mean[0] == torch.tensor(0.1).double()


def test_other_layouts_and_small_tensors_are_left_to_torch():
    x = torch.randn(16, 12, 17, 19)[:, ::2]
    assert not compiled_moments.takes(x, 1)
    assert not compiled_moments.takes(torch.randn(2, 3, 4), 1)
    count, mean, _ = ops.channel_moments(x, 1)
    assert count == 16 * 17 * 19
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)))


@pytest.mark.parametrize("order", [(60, 128, 1, 63), (128, 2, 65, 60)], ids=str)
def test_batches_that_come_and_go(order):
    """A last batch of any size, before or after whole ones: a failed compilation warns, which is an error here."""
    compiled_moments._kernel.cache_clear()
    for rows in order:
        check(torch.randn(rows, 4200, generator=torch.Generator().manual_seed(rows)) + 3, 1)
