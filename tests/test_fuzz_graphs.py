"""Random networks: base = transform at alpha 0 = restore = plug-in = export; at alpha > 0 an independent reference."""

from __future__ import annotations

import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx.errors import CaptureError
from meansparse_fx.export import to_exported_program
from meansparse_fx.operators import set_statistics
from meansparse_fx.statistics import ChannelStatistics, Statistics
from tests.random_graphs import Network, recording

FAST, SLOW, COMPILED, EXPORTED = 24, 100, 12, 6


def gradients(model, images, parameters=()):
    x = images.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)


def same(a, b):
    """Return whether gradients agree to the rounding of sums that come together in another order."""
    if a is None or b is None:
        return a is b
    return bool(((a - b).abs() <= 1e-13 * (1 + b.abs().max())).all())


def statistics_of(plan, seed):
    g = torch.Generator().manual_seed(seed)
    return Statistics(
        {
            s.name: ChannelStatistics(
                10,
                torch.randn(s.channels, generator=g, dtype=torch.float64) * 0.5,
                torch.rand(s.channels, generator=g, dtype=torch.float64) * 10,
            )
            for s in plan.active
        },
        "",
        10,
    )


def prepared(seed, keep=None):
    """Return network, images, its plan, statistics, alpha, and what the reference computes with them."""
    net = Network(seed, keep).double().eval()
    images = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed % 4 == 0:
        images = images.contiguous(memory_format=torch.channels_last)
    with recording() as record:
        net(images)
    return net, images, record.sites


def reference(net, images, plan, alpha, statistics):
    bands = [(statistics[s.name].mean, alpha * statistics[s.name].std) for s in plan.active]
    with recording(bands):
        return gradients(net, images)


def check(seed, keep=None):
    """Transformed, restored and with everything fused."""
    net, images, sites = prepared(seed, keep)
    if all(gate for *_, gate in sites):
        return
    names = [n for n, _ in net.named_parameters()]
    base = gradients(net, images, net.parameters())
    sparse = msfx.transform(net, images[:2])
    plan = msfx.inspect(sparse)
    assert [(s.channel_dim, s.channels) for s in plan.active] == [s[:2] for s in sites if not s[2]], f"plan:\n{plan}"
    known = [s for s in plan if s.refusal is None or s.refusal.kind != "own backward"]
    assert len(known) == len(sites), f"plan:\n{plan}"
    for model, form in ((sparse, "transform"), (msfx.restore(sparse), "restore")):
        own = dict(model.named_parameters())
        actual = gradients(model, images, [own[n] for n in names])
        for what, a, b in zip(["value", "images", *names], actual, base, strict=True):
            assert (torch.equal if what == "value" else same)(a, b), f"{form}: {what} differs"
    alpha, statistics = 0.1 + (seed % 7) / 5, statistics_of(plan, seed)
    expected = reference(net, images, plan, alpha, statistics)
    set_statistics(sparse, statistics, check_weights=False)
    msfx.set_alpha(sparse, alpha)
    agree(gradients(sparse, images), expected)
    fused = msfx.transform(net.requires_grad_(False), images, fuse="all")
    set_statistics(fused, statistics, check_weights=False)
    msfx.set_alpha(fused, alpha)
    agree(gradients(fused, images), expected)


def check_compiled(seed, keep=None):
    """The plug-in, with sites of the same names."""
    net, images, sites = prepared(seed, keep)
    if all(gate for *_, gate in sites):
        return
    plan = msfx.inspect(net, images)
    alpha, statistics = 0.1 + (seed % 7) / 5, statistics_of(plan, seed)
    expected = reference(net, images, plan, alpha, statistics)
    torch.compiler.reset()
    options = {"inner": "eager", "statistics": statistics, "alpha": alpha, "check_weights": False}
    compiled = torch.compile(net, backend="meansparse", options=options)
    actual = gradients(compiled, images)
    report = msfx.compile_report(compiled)
    assert [s.name for s in report.plan.active] == [s.name for s in plan.active], f"{report.plan}\n{plan}"
    agree(actual, expected)
    report.set_alpha(0.0)
    agree(gradients(compiled, images), gradients(net, images))
    torch.compiler.reset()


def check_exported(seed, keep=None):
    """An exported program, at another batch size too."""
    net, images, sites = prepared(seed, keep)
    if all(gate for *_, gate in sites):
        return
    sparse = msfx.transform(net, images)
    plan = msfx.inspect(sparse)
    alpha, statistics = 0.1 + (seed % 7) / 5, statistics_of(plan, seed)
    expected = reference(net, images, plan, alpha, statistics)
    set_statistics(sparse, statistics, check_weights=False)
    msfx.set_alpha(sparse, alpha)
    program = to_exported_program(sparse, images).module()
    agree((program(images).detach(),), expected[:1])
    agree((program(images[:1]).detach(),), (expected[0][:1],))


def agree(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def seeds(slow, fast=0):
    return pytest.mark.parametrize(
        "seed", [*range(fast), *(pytest.param(s, marks=pytest.mark.slow) for s in range(fast, slow))]
    )


@seeds(SLOW, FAST)
def test_transformed(seed):
    check(seed)


@seeds(COMPILED, 2)
def test_compiled(seed):
    check_compiled(seed)


@seeds(EXPORTED, 1)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:exported for inference")
def test_exported(seed):
    check_exported(seed)


class Rows(torch.nn.Module):
    def forward(self, x):
        return torch.cat([torch.clamp(row, 0, 6) for row in x.chunk(2, 2)], 2)


def test_what_is_written_out_in_a_part_that_is_not_traced_is_found():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Rows(), torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU())
    assert [s.activation.name for s in msfx.inspect(net.eval(), torch.rand(2, 3, 6, 6))] == ["relu6", "relu6", "relu"]


class Halves(torch.nn.Module):
    """Leaves an image alone or not, as its values are: no trace can follow."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = x + 3
        y[y < 0] = 0
        return x * torch.clamp(y, max=6).div(6)


def test_what_is_written_out_where_no_trace_can_follow_is_named():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Halves(), torch.nn.ReLU())
    with pytest.raises(CaptureError, match=r"written out in there: .*a hardswish in 1 \(Halves\)"):
        msfx.inspect(net.eval(), torch.rand(2, 3, 6, 6))
