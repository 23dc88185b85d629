"""Frozen batch norm, LayerScale and residual add inside the kernel, against float64 autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meansparse_fx.kernels import reference
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors

from . import calls

SILU = Options(1, "silu", input_eps=0.2, sum_eps=0.1)
BOTH = SILU._replace(want_sum=True)
STATE = ("mean", "variance", "weight", "bias")

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
    "input_norm",
    "input_norm residual",
    "layer_scale residual",
    "residual",
    "residual sum_norm",
    "input_norm residual sum_norm",
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
    residual = random(2, *x.shape).to(x) if "residual" in names else None
    parts = [n for n in names if n == "layer_scale"]
    parts += [n.replace("norm", part) for n in names if n.endswith("norm") for part in STATE]
    prologue = {n: random(3 + i, 5).to(device) + 1 for i, n in enumerate(parts)}
    prologue |= {n: v.square() + 0.1 for n, v in prologue.items() if n.endswith("variance")}
    wide = {n: v.double().view(1, -1, 1, 1) for n, v in prologue.items()}
    one = torch.ones((), device=device)

    def normed(t: Tensor, of: str, eps: float) -> tuple[Tensor, Tensor]:
        """Return what a norm makes of t, and its slope."""
        if f"{of}_mean" not in wide:
            return t, one
        mean, variance, weight, bias = (wide[f"{of}_{part}"] for part in STATE)
        return (t - mean) / (variance + eps).sqrt() * weight + bias, weight / (variance + eps).sqrt()

    leaf = x.double().requires_grad_()
    v, factor = normed(leaf, "input", SILU.input_eps)
    factor = factor * wide.get("layer_scale", 1)
    v = v * wide.get("layer_scale", 1) + (0 if residual is None else residual.double())
    v.retain_grad()
    u, _ = normed(v, "sum", SILU.sum_eps)
    centre = random(1, 5).to(device) / 2
    # The middle of the widest gap among the inner half of the distances, so that about half the samples are inside.
    distance = (u.detach() - centre.view(1, -1, 1, 1)).abs().transpose(0, 1).flatten(1).sort(1).values[:, 6:18]
    widest = distance.diff(dim=1).argmax(1, keepdim=True)
    threshold = (distance.gather(1, widest) + distance.gather(1, widest + 1)).flatten().float() / 2
    inside = (u - centre.view(1, -1, 1, 1)).abs() <= threshold.view(1, -1, 1, 1)
    y = F.silu(torch.where(inside, centre.double().view(1, -1, 1, 1), u))
    grad_y = random(4, *x.shape).to(x)
    y.backward(grad_y.double())
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


@pytest.mark.parametrize("names", ["input_norm"], indirect=True)
def test_a_norm_is_read_at_each_call(case) -> None:
    """Also what no version counts, and in half precision; folded it is the same norm."""
    vectors = Vectors(*case.vectors[:7])
    own = Operator(vectors, SILU, "triton")
    own(case.x)
    vectors.input_variance.data.mul_(4).add_(1)
    vectors.input_mean.data.zero_()
    narrow = vectors._replace(input_weight=vectors.input_weight.bfloat16(), input_bias=None)
    for given in (vectors, narrow):
        _, variance, weight, bias = (0 if v is None else v.double().view(1, -1, 1, 1) for v in given.input_norm)
        u = case.x.double() / (variance + SILU.input_eps).sqrt() * weight + bias
        centre, threshold = (v.double().view(1, -1, 1, 1) for v in vectors[:2])
        distance = (u - centre).abs()
        far = (distance - threshold).abs() > 1e-5
        expected = F.silu(torch.where(distance <= threshold, centre, u))
        same = own if given is vectors else Operator(given, SILU, "triton")
        folded = Operator(reference.folded(given, SILU), SILU, "triton")
        for found in (same(case.x), folded(case.x)):
            assert_close(found[far], expected[far], case.rtol)


def test_the_sum_as_a_second_output(case) -> None:
    y, v = calls.forward(case.x, case.vectors, BOTH, case.residual)
    assert v.stride() == y.stride() == case.x.stride()
    assert_close(v, case.v.detach(), case.rtol)
    # y is the operator of the sum as returned, bit for bit.
    norm = Vectors(*case.vectors[:3], *case.vectors.sum_norm)
    alone = SILU._replace(input_eps=SILU.sum_eps)
    assert torch.equal(y, calls.forward(v, norm, alone))
    both = calls.forward(case.x, case.vectors, BOTH, case.residual, case.grad_y)
    assert torch.equal(both[1], v)
    assert torch.equal(both[0], calls.forward(v, norm, alone, shortcut=case.grad_y))


def test_gradients_through_both_outputs(case) -> None:
    _, v = calls.forward(case.x, case.vectors, BOTH, case.residual)
    grads = calls.backward(case.grad_y, v, case.vectors, BOTH, case.residual, case.grad_y, want_grad_sum=True)
    outer = case.vectors._replace(**{f"input_{part}": None for part in STATE}, layer_scale=None)
    plain = calls.backward(case.grad_y, v, outer, BOTH).x.double()
    both = case.grad_y.double() + plain
    rounding = case.rtol * (plain.abs() + both.abs()) + 1e-6  # each is rounded apart
    assert ((grads.v.double() - both).abs() <= rounding).all()
    assert_close(grads.x, grads.v.double() * case.factor, 2 * case.rtol)
    assert (grads.x is grads.v) == (case.factor.dim() == 0)
