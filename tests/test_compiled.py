"""The compiled CPU lowering against the eager one, and what happens where there is no compiler."""

from __future__ import annotations

import pytest
import torch

from meansparse_fx.kernels import compiled, ops

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
}


def tensors(layout: str):
    g = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(9, 24, 20, 17, generator=g))
    return x, torch.randn(24, generator=g) * 0.1, torch.rand(24, generator=g) - 0.1


@pytest.fixture
def auto(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "auto")
    if not compiled.available():
        pytest.skip("no C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "variant"), [("gelu", "mean"), ("relu", "mean"), ("silu", "smooth")])
@pytest.mark.parametrize("backward", ["exact", "identity"])
def test_compiled_agrees_with_eager(auto, monkeypatch, layout, name, variant, backward):
    x, centre, threshold = tensors(layout)
    x.requires_grad_()
    assert ops.lowering_of(x, 1) == "compiled"
    results = []
    for choice in ("auto", "eager"):
        monkeypatch.setenv("MEANSPARSE_FX_LOWERING", choice)
        y = ops.mean_sparse(x, centre, threshold, 1, name, variant=variant, backward=backward)
        upstream = torch.linspace(-1, 1, y.numel()).view(y.shape)  # another layout than y's
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-6, atol=2e-6)
        assert own.stride() == x.stride()


@pytest.mark.slow
def test_one_kernel_serves_all_sizes(auto):
    for rows in (9, 10, 31):
        x = torch.randn(rows, 64, 32, 33)
        assert torch.equal(ops.mean_sparse(x, torch.zeros(64), torch.full((64,), -1.0), 1), x)
        with torch.compiler.set_stance("fail_on_recompile"):
            ops.mean_sparse(x, torch.zeros(64), torch.full((64,), -1.0), 1)


def test_small_strided_and_sloped_inputs_stay_eager(auto):
    x, _, _ = tensors("contiguous")
    assert ops.lowering_of(x, 1) == "compiled"
    assert ops.lowering_of(x[:1], 1) == "eager"
    assert ops.lowering_of(x[..., ::2], 1) == "eager"
    assert ops.lowering_of(x, 1, weight=torch.rand(24)) == "eager"


def test_without_a_compiler_torch_operators_do_the_work(auto, monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    x, centre, threshold = tensors("contiguous")
    assert ops.lowering_of(x, 1) == "eager"
    assert ops.mean_sparse(x, centre, threshold, 1).shape == x.shape


def test_a_broken_toolchain_is_reported_and_survived(auto, monkeypatch):
    def broken(*args):
        raise RuntimeError("ld: cannot find -lm")

    monkeypatch.setattr(torch, "compile", lambda *a, **k: broken)
    compiled.kernel.cache_clear()
    x, centre, threshold = tensors("contiguous")
    with pytest.warns(UserWarning, match="using torch operators: ld: cannot find"):
        y = ops.mean_sparse(x, centre, threshold, 1, "relu")
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    assert torch.equal(y, ops.mean_sparse(x, centre, threshold, 1, "relu"))
    compiled.kernel.cache_clear()
