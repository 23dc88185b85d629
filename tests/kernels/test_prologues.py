"""Frozen batch norm, LayerScale and residual add inside the kernel, against float64 autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meansparse_fx.kernels.records import Options, Vectors

from . import calls

SILU, BOTH = Options(1, "silu"), Options(1, "silu", want_sum=True)

# As in test_elementwise: rounded once, a whole unit for bfloat16 under the interpreter, which truncates.
TOLERANCES = {
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3 if torch.cuda.is_available() else 8e-3,
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=1e-6)


PROLOGUES = [
    "input_scale input_shift",
    "input_scale input_shift residual",
    "layer_scale residual",
    "residual",
    "residual sum_scale sum_shift",
    "input_scale input_shift residual sum_scale sum_shift",
]


@pytest.fixture(params=PROLOGUES)
def names(request) -> list[str]:
    return request.param.split()


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def memory_format(request) -> torch.memory_format:
    return request.param


@pytest.fixture(params=list(TOLERANCES), ids=str)
def case(request, names, memory_format, device) -> SimpleNamespace:
    """x, the prologue's arguments, v and u in float64 with their graph, and a band whose edges no u is near."""
    dtype = request.param
    x = random(0, 2, 5, 3, 4).to(device, dtype).contiguous(memory_format=memory_format)
    prologue = {n: random(2, *x.shape).to(x) if n == "residual" else random(3, 5).to(device) + 1 for n in names}
    wide = {n: v.double() if n == "residual" else v.double().view(1, -1, 1, 1) for n, v in prologue.items()}
    factor = wide.get("input_scale", torch.ones((), device=device)) * wide.get("layer_scale", 1)
    leaf = x.double().requires_grad_()
    v = leaf * wide.get("input_scale", 1) + wide.get("input_shift", 0)
    v = v * wide.get("layer_scale", 1) + wide.get("residual", 0)
    v.retain_grad()
    u = v * wide.get("sum_scale", 1) + wide.get("sum_shift", 0)
    centre = random(1, 5).to(device) / 2
    # The middle of the widest gap among the inner half of the distances, so that about half the samples are inside.
    distance = (u.detach() - centre.view(1, -1, 1, 1)).abs().transpose(0, 1).flatten(1).sort(1).values[:, 6:18]
    widest = distance.diff(dim=1).argmax(1, keepdim=True)
    threshold = (distance.gather(1, widest) + distance.gather(1, widest + 1)).flatten().float() / 2
    inside = (u - centre.view(1, -1, 1, 1)).abs() <= threshold.view(1, -1, 1, 1)
    y = F.silu(torch.where(inside, centre.double().view(1, -1, 1, 1), u))
    grad_y = random(4, *x.shape).to(x)
    y.backward(grad_y.double())
    residual = prologue.pop("residual", None)
    vectors = Vectors(centre, threshold, **prologue)
    return SimpleNamespace(
        x=x, residual=residual, vectors=vectors, factor=factor, v=v, y=y, grad_y=grad_y, grad_x=leaf.grad,
        rtol=TOLERANCES[dtype],
    )  # fmt: skip


def test_prologue(case) -> None:
    y = calls.forward(case.x, case.vectors, SILU, case.residual)
    assert_close(y, case.y.detach(), case.rtol)
    shortcut = case.grad_y  # as good as any
    added = calls.forward(case.x, case.vectors, SILU, case.residual, shortcut)
    bound = case.rtol * (case.y.abs() + shortcut.double().abs()) + 1e-6
    assert ((added.double() - case.y - shortcut.double()).abs() <= bound).all()
    grads = calls.backward(case.grad_y, case.x, case.vectors, SILU, case.residual, want_grad_sum=True)
    assert_close(grads.x, case.grad_x, case.rtol)
    assert_close(grads.v, case.v.grad, case.rtol)


def test_the_sum_as_a_second_output(case) -> None:
    y, v = calls.forward(case.x, case.vectors, BOTH, case.residual)
    assert v.stride() == y.stride() == case.x.stride()
    assert_close(v, case.v.detach(), case.rtol)
    # y is the operator of the sum as returned, bit for bit.
    centre, threshold, *_, scale, shift = case.vectors
    norm = Vectors(centre, threshold, input_scale=scale, input_shift=shift)
    assert torch.equal(y, calls.forward(v, norm, SILU))
    both = calls.forward(case.x, case.vectors, BOTH, case.residual, case.grad_y)
    assert torch.equal(both[1], v)
    assert torch.equal(both[0], calls.forward(v, norm, SILU, shortcut=case.grad_y))


def test_gradients_through_both_outputs(case) -> None:
    _, v = calls.forward(case.x, case.vectors, BOTH, case.residual)
    grads = calls.backward(case.grad_y, v, case.vectors, BOTH, case.residual, case.grad_y, want_grad_sum=True)
    outer = case.vectors._replace(input_scale=None, input_shift=None, layer_scale=None)
    plain = calls.backward(case.grad_y, v, outer, BOTH).x.double()
    both = case.grad_y.double() + plain
    rounding = case.rtol * (plain.abs() + both.abs()) + 1e-6  # each is rounded apart
    assert ((grads.v.double() - both).abs() <= rounding).all()
    assert_close(grads.x, grads.v.double() * case.factor, 2 * case.rtol)
    assert (grads.x is grads.v) == (case.factor.dim() == 0)
