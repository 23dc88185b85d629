"""The torch operator over the Triton kernels: what a transformed model calls on a GPU."""

from __future__ import annotations

import pytest
import torch

from meansparse_fx.kernels import ops, reference
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors
from tests.models import mean_sparse


@pytest.fixture(autouse=True)
def triton_lowering(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "triton")


@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "prelu", "pssilu"])
@pytest.mark.parametrize("backward", reference.BACKWARDS)
def test_operator_is_the_reference(name, backward, device) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 3, generator=g).to(device).requires_grad_()
    centre, threshold = (torch.randn(6, generator=g).to(device), (torch.rand(6, generator=g) - 0.1).to(device))
    constants = tuple(default for _, default in reference.ACTIVATIONS[name].constants)
    weight = torch.rand(6, generator=g).to(device).requires_grad_() if name in ("prelu", "pssilu") else None
    assert ops.lowering_of(x, 1, weight) == "triton"
    leaves = [t for t in (x, weight) if t is not None]
    y, expected = (
        entry(x, centre, threshold, 1, name, constants, weight, backward=backward)
        for entry in (ops.mean_sparse, mean_sparse)
    )
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    upstream = torch.randn(y.shape, generator=g).to(device)
    for own, ref in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(own, ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("want_sum", [False, True])
@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_operator_is_its_composition(strides, want_sum, device, monkeypatch) -> None:
    g = torch.Generator().manual_seed(0)
    streams = [torch.randn(2, 6, 5, 3, generator=g).to(device) for _ in range(5)]
    x, residual = (t.contiguous(memory_format=strides) for t in streams[:2])
    shortcut = streams[2]  # of its own layout
    vectors = Vectors(
        *(torch.rand(6, generator=g).to(device) for _ in range(2)),
        None,
        *(torch.randn(6, generator=g).to(device) for _ in range(5)),
    )
    leaves = [t.requires_grad_() for t in (x, residual, shortcut)]
    results = []
    for choice in ("triton", "eager"):
        monkeypatch.setenv("MEANSPARSE_FX_LOWERING", choice)
        found = Operator(vectors, Options(1, want_sum=want_sum))(*leaves)
        found = found if want_sum else (found,)
        grads = torch.autograd.grad(found, leaves, streams[3 : 3 + len(found)])
        results.append((*found, *grads))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_what_is_kept_may_come_back_in_another_layout(name, device) -> None:
    """As `torch.autograd.graph.save_on_cpu` gives it back where it pins memory."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 3, generator=g).to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    own = Operator(Vectors(torch.zeros(6, device=device), torch.full((6,), 0.3, device=device)), Options(1, name))
    upstream = torch.randn(x.shape, generator=g).to(device).contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(own(x), x, upstream)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        (found,) = torch.autograd.grad(own(x), x, upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("negated", "choice"), [*((n, "triton") for n in ("x", "residual", "shortcut", "upstream")), ("x", "auto")]
)
def test_views_whose_memory_holds_other_signs(negated, choice, device, monkeypatch) -> None:
    """``z.conj().imag`` is such a view, and the gradient of what becomes an imaginary part is."""
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", choice)
    g = torch.Generator().manual_seed(0)
    names = ["x", "residual", "shortcut", "upstream"]
    tensors = {n: torch.randn(4, 8, 16, 32, generator=g).to(device) for n in names}
    plain = tensors | {negated: -tensors[negated]}
    views = tensors | {negated: torch._neg_view(tensors[negated])}
    assert views[negated].is_neg()
    own = Operator(Vectors(torch.zeros(8, device=device), torch.full((8,), 0.3, device=device)), Options(1, "gelu"))
    found = []
    for given in (views, plain):
        x = given["x"].detach().requires_grad_()
        alone = negated in ("x", "upstream")
        y = own(x) if alone else own(x, given["residual"], given["shortcut"])
        found.append((y, *torch.autograd.grad(y, x, given["upstream"])))
    for view, expected in zip(*found, strict=True):
        torch.testing.assert_close(view, expected, rtol=1e-5, atol=1e-5)
    if negated == "x":
        (_, mean, _), (_, expected, _) = (ops.channel_moments(given["x"], 1) for given in (views, plain))
        torch.testing.assert_close(mean, expected)


def test_moments_are_those_of_the_observer(device) -> None:
    x = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0)).to(device) + 7
    count, mean, m2 = ops.channel_moments(x, 1)
    wide = x.double().transpose(0, 1).flatten(1)
    assert count == 60
    torch.testing.assert_close(mean, wide.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2, wide.var(1, correction=0) * 60, rtol=2e-6, atol=0)


def test_what_no_kernel_can_compute_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    x, vector = torch.ones(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"no activation 'swoosh': one of .*relu"):
        ops.mean_sparse(x, vector, vector, 1, "swoosh")
    with pytest.raises(ValueError, match=r"variant must be one of mean, .*'median'"):
        ops.mean_sparse(x, vector, vector, 1, variant="median")
    with pytest.raises(ValueError, match="x has 2 channels at dim 0, the operator 3"):
        ops.mean_sparse(x, vector, vector, 0)
    with pytest.raises(ValueError, match="x is on cpu, and what belongs to it on meta: move the model or the images"):
        ops.mean_sparse(x, vector.to("meta"), vector, 1)
