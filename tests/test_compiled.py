"""The compiled CPU lowering against the eager one, and what happens where there is no compiler."""

from __future__ import annotations

import warnings

import pytest
import torch

from meansparse_fx.kernels import compiled, operator, ops
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors
from meansparse_fx.kernels.unguarded import Unguarded

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
def test_who_reads_a_result_may_write_into_it(auto):
    """As into that of torch's GELU or SiLU: x = act(x), then x += shortcut."""
    x, centre, threshold = tensors("tokens")
    x.requires_grad_()
    assert ops.lowering_of(x, 1) == "compiled"
    plain = ops.mean_sparse(x, centre, threshold, 1, "gelu")
    written = ops.mean_sparse(x, centre, threshold, 1, "gelu")
    written[:, :3] += 1.0
    written.mul_(2.0)
    shift = torch.zeros(24, 1).index_fill(0, torch.arange(3), 1.0)
    assert torch.equal(written, (plain + shift) * 2)
    ours, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (written, plain * 2))
    assert torch.equal(ours, expected)


@pytest.mark.slow
def test_one_kernel_serves_all_sizes(auto):
    for rows in (9, 10, 31):
        x = torch.randn(rows, 64, 32, 33)
        assert torch.equal(ops.mean_sparse(x, torch.zeros(64), torch.full((64,), -1.0), 1), x)
        with torch.compiler.set_stance("fail_on_recompile"):
            ops.mean_sparse(x, torch.zeros(64), torch.full((64,), -1.0), 1)


@pytest.mark.slow
@pytest.mark.parametrize("want_sum", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backward", ["exact", "identity"])
def test_each_kind_of_sizes_is_compiled_once(auto, monkeypatch, backward, residual, want_sum):
    monkeypatch.setattr(operator, "_RUNNERS", {})
    compiled._kernel.cache_clear()
    kernels = []
    monkeypatch.setattr(compiled, "_kernel", lambda *a, make=compiled._kernel: kernels.append(make(*a)) or kernels[-1])
    found = {}
    for choice in ("eager", "auto"):
        monkeypatch.setenv("MEANSPARSE_FX_LOWERING", choice)
        for rows in (9, 10, 24):
            g = torch.Generator().manual_seed(rows)
            x, r, s = (torch.randn(rows, 24, 20, 17, generator=g) for _ in range(3))
            x.requires_grad_()
            vectors = Vectors(
                torch.zeros(24),
                torch.full((24,), 0.3),
                input_mean=torch.zeros(24),
                input_variance=torch.linspace(0.5, 2, 24),
                layer_scale=torch.linspace(1, 2, 24),
            )
            options = Options(1, "gelu", backward=backward, want_sum=want_sum)
            y = Operator(vectors, options)(x, r if residual else None, s)
            y, v = y if want_sum else (y, y)
            (grad,) = torch.autograd.grad((y * s + v).sum(), x)
            for name, own in {"y": y, "v": v, "grad": grad}.items():
                key = rows, name
                torch.testing.assert_close(own, found.setdefault(key, own), rtol=1e-5, atol=1e-5)
    assert kernels
    for kernel in kernels:
        assert len(kernel._calls) == 2  # 24 rows of 24 channels are a kind of their own


@pytest.mark.slow
def test_a_call_seen_before_is_told_by_everything_it_depends_on(auto, monkeypatch):
    """Layouts, dtypes and options that differ in one thing each, in turns, against the eager lowering."""
    x, centre, threshold = tensors("contiguous")
    cases = [
        (LAYOUTS[layout](x).to(dtype), threshold, options)
        for layout in LAYOUTS
        for dtype in (torch.float32, torch.float64)
        for options in ({}, {"variant": "edge"}, {"activation": "gelu"}, {"backward": "identity"})
    ]
    cases += [(x[:8], threshold, {}), (x.flip(0), threshold, {}), (x, threshold[:1].expand(24), {})]
    for _ in range(3):
        for given, band, options in cases:
            given = given.detach().requires_grad_()
            results = []
            for choice in ("auto", "eager"):
                monkeypatch.setenv("MEANSPARSE_FX_LOWERING", choice)
                y = ops.mean_sparse(given, centre, band, 1, **{"activation": "relu"} | options)
                results.append((y, *torch.autograd.grad(y, given, torch.cos(given.detach()))))
            for own, expected in zip(*results, strict=True):
                torch.testing.assert_close(own, expected, rtol=2e-6, atol=2e-6)
                assert own.stride() == given.stride()


@pytest.mark.slow
def test_who_observes_gets_the_reference_and_a_profiler_changes_nothing(auto, monkeypatch):
    x, centre, threshold = tensors("contiguous")
    ran = []
    run = Operator.forward
    monkeypatch.setattr(Operator, "forward", lambda *a: (ran.append(1), run(*a))[1])
    expected = ops.mean_sparse(x, centre, threshold, 1, "relu")
    with torch.profiler.profile(), torch.device("cpu"):
        assert torch.equal(ops.mean_sparse(x, centre, threshold, 1, "relu"), expected)
    assert len(ran) == 2
    seen = []

    class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **kwargs or {})

    class Called(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **kwargs or {})

    for mode in (Dispatched, Called):
        seen.clear()
        with mode():
            assert torch.equal(ops.mean_sparse(x, centre, threshold, 1, "relu"), expected)
        assert any("relu" in name for name in seen), mode
    assert len(ran) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
        traced = torch.jit.trace(lambda v: ops.mean_sparse(v, centre, threshold, 1, "relu"), x)
    assert "aten::where" in str(traced.graph)


@pytest.mark.slow
def test_one_call_without_guards_serves_all_sizes_of_its_kind(auto):
    unguarded = Unguarded(
        lambda x, other, vector: (x + vector[:, None], x * 2 if other is None else x * other), "example"
    )
    g = torch.Generator().manual_seed(0)

    def check(outer, channels, inner, other=True, dtype=torch.float32, same=False):
        x = torch.randn(outer, channels, inner, generator=g).to(dtype)
        vector = torch.randn(channels, generator=g).to(dtype)
        factor = None if not other else x if same else torch.randn(x.shape, generator=g).to(dtype)
        own = unguarded(x, factor, vector)
        assert torch.equal(own[0], x + vector[:, None])
        assert torch.equal(own[1], x * (2 if factor is None else factor))

    check(2, 3, 4)
    check(2, 3, 4)
    for sizes in ((5, 6, 7), (9, 8, 64), (3, 17, 129), (3, 2, 1000)):
        check(*sizes)
    assert len(unguarded._calls) == 1
    check(5, 6, 7, same=True)  # the same tensor twice
    assert len(unguarded._calls) == 1
    others = [(4, 4, 5), (5, 4, 4), (4, 5, 4), (4, 4, 4), (1, 3, 4), (2, 1, 4), (2, 3, 1), (1, 1, 1), (0, 3, 4)]
    for sizes in others:  # equal sizes, ones and zeros
        for _ in range(2):
            check(*sizes)
    assert len(unguarded._calls) == 1 + len(others)
    check(2, 3, 4, other=False)
    check(6, 3, 4, other=False)
    check(2, 3, 4, dtype=torch.float64)
    check(6, 3, 4, dtype=torch.float64)
    assert len(unguarded._calls) == 3 + len(others)


@pytest.mark.slow
def test_a_first_call_with_one_tensor_twice_stays_right(auto):
    unguarded = Unguarded(lambda x, y: (x * 2 + y,), "twice")
    x, y = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    for given in ((x, x), (x, y), (y, x), (y, y)):
        for _ in range(2):
            torch.testing.assert_close(unguarded(*given)[0], given[0] * 2 + given[1])


def test_small_strided_and_sloped_inputs_stay_eager(auto):
    x, _, _ = tensors("contiguous")
    assert ops.lowering_of(x, 1) == "compiled"
    assert ops.lowering_of(x[:1], 1) == "eager"
    assert ops.lowering_of(x[..., ::2], 1) == "eager"
    assert ops.lowering_of(x, 1, weight=torch.rand(24)) == "eager"
    assert ops.lowering_of(x.to("meta"), 1) == "eager"
    assert ops.lowering_of(x, 1, choice="triton") == "triton"


def test_without_a_compiler_torch_operators_do_the_work(auto, monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    x, centre, threshold = tensors("contiguous")
    assert ops.lowering_of(x, 1) == "eager"
    assert ops.mean_sparse(x, centre, threshold, 1).shape == x.shape


def test_a_broken_toolchain_is_reported_and_survived(auto, monkeypatch):
    def broken(*args):
        raise RuntimeError("ld: cannot find -lm")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    monkeypatch.setattr(operator, "_RUNNERS", {})
    compiled._kernel.cache_clear()
    x, centre, threshold = tensors("contiguous")
    with pytest.warns(UserWarning, match="using torch operators: ld: cannot find"):
        y = ops.mean_sparse(x, centre, threshold, 1, "relu")
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    assert torch.equal(y, ops.mean_sparse(x, centre, threshold, 1, "relu"))
    compiled._kernel.cache_clear()


# What torch.compile sees of the operator.


def kept_for_backward(act, trainable):
    """Return the bytes of feature maps that a compiled convolution, norm and activation keep for backward."""
    torch.compiler.reset()
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8).eval()
    after = torch.nn.Conv2d(8, 4, 3)
    for module in (conv, norm, after):
        module.requires_grad_(trainable)
    kept = []
    compiled = torch.compile(
        lambda x: after(act(norm(conv(x)))).mean((2, 3)), backend="aot_eager_decomp_partition", fullgraph=True
    )
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compiled(x)
    y.sum().backward()
    return sum(t.numel() * t.element_size() for t in kept if t.dim() == 4 and t.shape[0] == 2)


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch before 2.14 stores the mask of the band")
@pytest.mark.parametrize("backward", ["exact", "identity"])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", ["relu", "relu6", "gelu", "silu"])
def test_compiled_operator_keeps_no_more_than_the_activation(name, trainable, backward):
    """Nor a mask: storing and loading one takes longer than all the rest of a CPU's backward pass."""
    centre, threshold = torch.linspace(-0.5, 0.5, 8), torch.full((8,), 0.3)
    own = kept_for_backward(lambda x: ops.mean_sparse(x, centre, threshold, 1, name, backward=backward), trainable)
    assert own <= kept_for_backward(getattr(torch.nn.functional, name), trainable)


@pytest.mark.parametrize("backward", ["exact", "identity", "smooth"])
def test_traced_gradients_with_dynamic_sizes(backward):
    torch.compiler.reset()
    centre, threshold = torch.linspace(-0.5, 0.5, 6), torch.full((6,), 0.3)
    slope = torch.linspace(0.1, 0.4, 6, requires_grad=True)

    def form(x):
        x = ops.mean_sparse(x, centre, threshold, 1, "relu6", backward=backward)
        return ops.mean_sparse(x - 1, centre, threshold, 1, "prelu", (), slope, backward=backward)

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((4, 6, 5, 5), (3, 6, 7, 2)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        for own, expected in zip(
            torch.autograd.grad(compiled(x).square().sum(), [x, slope]),
            torch.autograd.grad(form(x).square().sum(), [x, slope]),
            strict=True,
        ):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_two_clipping_calls_with_dynamic_sizes():
    """What a row of the activations says of itself must not become a symbol either."""
    torch.compiler.reset()
    band = torch.zeros(6), torch.full((6,), 0.3)

    def form(x):
        return ops.mean_sparse(ops.mean_sparse(x, *band, 1, "relu") - 1, *band, 1, "relu")

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((4, 6, 5, 5), (3, 6, 7, 2)):
        x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
        own, expected = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, form))
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_calls_share_numbers_with_dynamic_sizes():
    """Two calls with the same constants, from a tuple that Dynamo may take for symbols."""
    torch.compiler.reset()
    band, constants = (torch.zeros(6), torch.full((6,), 0.3)), (0.2,)

    def form(x):
        for _ in range(2):
            x = ops.mean_sparse(x, *band, 1, "leaky_relu", constants, backward="smooth")
        return x

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, form)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
