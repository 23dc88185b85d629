"""The operator with norm, sum and LayerScale before it and a sum after it, against the same written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meansparse_fx.kernels import composition, operator
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors

PROLOGUES = [
    ("input_norm",),
    ("residual",),
    ("input_norm", "residual"),
    ("layer_scale", "residual"),
    ("residual", "sum_norm"),
    ("input_norm", "residual", "sum_norm"),
    ("shortcut",),
    ("layer_scale", "shortcut"),
    ("input_norm", "layer_scale", "residual", "sum_norm", "shortcut"),
]
STREAMS = ("residual", "shortcut")
STATE = ("mean", "variance", "weight", "bias")
EPS = {"input_eps": 0.2, "sum_eps": 0.1}
LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(names, shape, dtype):
    """Return the arguments, and the same in float64: a band whose edges no value is near."""
    channels = shape[1]
    x = normal(0, *shape).to(dtype)
    residual, shortcut = (normal(s, *shape).to(dtype) if n in names else None for s, n in enumerate(STREAMS, 1))
    parts = [n for n in names if n == "layer_scale"]
    parts += [f"{n.removesuffix('norm')}{part}" for n in names if n.endswith("norm") for part in STATE]
    vectors = {n: normal(3 + i, channels).float() + 1 for i, n in enumerate(parts)}
    for n in parts:
        if n.endswith("variance"):
            vectors[n] = vectors[n].square() + 0.1
    if "layer_scale" in vectors:  # a parameter of the model, whose dtype x has
        vectors["layer_scale"] = vectors["layer_scale"].to(dtype)
    wide = {n: v.double().view(1, -1, 1, 1) for n, v in vectors.items()}
    leaves = [t if t is None else t.double().clone().requires_grad_() for t in (x, residual, shortcut)]

    def normed(t, of):
        mean, variance, weight, bias = (wide[f"{of}_{part}"] for part in STATE)
        return (t - mean) / (variance + EPS[f"{of}_eps"]).sqrt() * weight + bias

    v = normed(leaves[0], "input") if "input_norm" in names else leaves[0]
    v = v * wide.get("layer_scale", 1) + (0 if residual is None else leaves[1])
    u = normed(v, "sum") if "sum_norm" in names else v
    centre = normal(9, channels).float() / 2
    distance = (u.detach() - centre.double().view(1, -1, 1, 1)).abs().transpose(0, 1).flatten(1).sort(1).values
    middle = distance[:, distance.shape[1] // 4 : 3 * distance.shape[1] // 4]
    widest = middle.diff(dim=1).argmax(1, keepdim=True)
    threshold = (middle.gather(1, widest) + middle.gather(1, widest + 1)).flatten().float() / 2
    inside = (u - centre.double().view(1, -1, 1, 1)).abs() <= threshold.double().view(1, -1, 1, 1)
    y = F.silu(torch.where(inside, centre.double().view(1, -1, 1, 1), u)) + (0 if shortcut is None else leaves[2])
    return (x, residual, shortcut, Vectors(centre, threshold, **vectors)), leaves, v, y


def check(names, shape, dtype, layout, want_sum, rtol, choice=None):
    (*tensors, vectors), leaves, v, y = case(names, shape, dtype)
    inputs = [None if t is None else LAYOUTS[layout](t).requires_grad_() for t in tensors]
    results = Operator(vectors, Options(1, "silu", want_sum=want_sum, **EPS), choice)(*inputs)
    upstream = [normal(20 + i, *shape) for i in range(2 if want_sum else 1)]
    got = results if want_sum else (results,)
    for result, expected in zip(got, (y, v), strict=False):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=rtol)
    torch.autograd.backward(got, [g.to(dtype) for g in upstream])
    torch.autograd.backward((y, v)[: len(upstream)], [g.to(dtype).double() for g in upstream])
    for own, expected in zip(inputs, leaves, strict=True):
        if own is not None:
            # Terms of the largest gradient's size cancel in some elements: float32 has 1.2e-7 of those.
            atol = max(2 * rtol, 2.4e-7 * float(expected.grad.abs().max()))
            torch.testing.assert_close(own.grad.double(), expected.grad, rtol=2 * rtol, atol=atol)


# Rounded once forward, a few times backward; v is rounded to its dtype before the norm of it.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # vectors are float32


# Not bfloat16 with v as a result: rounded, it may fall on the other side of the band's edge.
CASES = [*itertools.product(TOLERANCES, (False,)), (torch.float64, True), (torch.float32, True)]


@pytest.mark.parametrize(("dtype", "want_sum"), CASES, ids=str)
@pytest.mark.parametrize("names", PROLOGUES, ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_float64(names, layout, dtype, want_sum):
    check(names, (3, 4, 5, 2), dtype, layout, want_sum, TOLERANCES[dtype])


@pytest.mark.parametrize("want_sum", [False, True])
@pytest.mark.parametrize("names", PROLOGUES, ids="+".join)
def test_as_compilers_are_given_it(names, want_sum):
    check(names, (3, 4, 5, 2), torch.float64, "rows", want_sum, TOLERANCES[torch.float64], "composition")


@pytest.mark.slow
@pytest.mark.parametrize("want_sum", [False, True])
@pytest.mark.parametrize("names", PROLOGUES, ids="+".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_for_the_cpu(names, layout, want_sum, monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "auto")
    check(names, (8, 16, 32, 32), torch.float32, layout, want_sum, TOLERANCES[torch.float32])


def test_norms_made_in_inference_mode():
    """They count no writes; a GPU's kernels read a model's own."""
    (x, *_, vectors), (wide, *_), _, y = case(("input_norm", "layer_scale", "sum_norm"), (3, 4, 5, 2), torch.float32)
    with torch.inference_mode():
        vectors = Vectors(*vectors[:3], *[v if v is None else v.clone() for v in vectors[3:]])
    assert vectors.input_mean.is_inference()
    x.requires_grad_()
    Operator(vectors, Options(1, "silu", **EPS))(x).sum().backward()
    y.sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("want_sum", [False, True])
def test_what_is_kept_for_backward(want_sum):
    """x and the residual, or v alone where it is a result that lives on anyway; nothing else of their size."""
    (x, residual, shortcut, vectors), *_ = case(PROLOGUES[-1], (3, 4, 5, 2), torch.float32)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Operator(vectors, Options(1, "silu", want_sum=want_sum))(x, residual, shortcut)
    assert sum(t is not None and t.numel() == x.numel() for t in kept) == (1 if want_sum else 2)


@pytest.mark.parametrize("backward", ["exact", "identity"])
@pytest.mark.parametrize("names", [("input_norm",), ("residual",), ("input_norm", "residual")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_relus_gradient_is_told_from_its_result(names, backward, dtype, create_graph):
    """The result alone is kept, which the next layer keeps anyway; in half precision, where it is rounded, more."""
    (x, residual, _, vectors), leaves, v, _ = case(names, (3, 6, 5, 2), dtype)
    # Bands on both sides of zero, some of which hold it: there a result of zero says little of where u was.
    centre = vectors.centre.clone()
    centre[:2] *= 0.05
    vectors = vectors._replace(centre=centre)
    inputs = [None if t is None else t.requires_grad_() for t in (x, residual)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = Operator(vectors, Options(1, "relu", backward=backward, **EPS))(*inputs, None)
    large = [t for t in kept if t.numel() == x.numel()]
    if dtype == torch.bfloat16:
        assert len(large) == 1 + ("residual" in names)
    else:
        assert len(large) == 1
        assert large[0].data_ptr() == y.data_ptr()
    shaped = [t.double().view(1, -1, 1, 1) for t in (centre, vectors.threshold)]
    inside = (v.detach() - shaped[0]).abs() <= shaped[1]
    straight = shaped[0] + (v - v.detach() if backward == "identity" else 0)
    expected = F.relu(torch.where(inside, straight, v))
    upstream = normal(20, *x.shape).to(dtype)
    given = [own for own in inputs if own is not None]
    gradients = torch.autograd.grad(y, given, upstream, create_graph=create_graph)
    expected.backward(upstream.double())
    tolerance = TOLERANCES[dtype]
    for own, leaf in zip(gradients, leaves, strict=False):
        torch.testing.assert_close(own.double(), leaf.grad, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("choice", [None, "composition"])
@pytest.mark.parametrize("read", ["y", "v"])
def test_of_two_results_one_may_be_read_alone(read, choice):
    names = PROLOGUES[-1]
    (*tensors, vectors), leaves, v, y = case(names, (3, 4, 5, 2), torch.float64)
    inputs = [t.requires_grad_() for t in tensors]
    results = Operator(vectors, Options(1, "silu", want_sum=True, **EPS), choice)(*inputs)
    upstream, expected = normal(20, *y.shape), {"y": y, "v": v}[read]
    results[read == "v"].backward(upstream)
    expected.backward(upstream)
    for own, leaf in zip(inputs, leaves, strict=True):
        wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(own.grad, wanted, rtol=1e-6, atol=1e-6)


def test_no_gradient_wanted():
    (x, residual, _, vectors), *_ = case(PROLOGUES[2], (3, 4, 5, 2), torch.float32)
    assert not Operator(vectors, Options(1, "relu"))(x, residual, None).requires_grad
    with torch.no_grad():
        assert not Operator(vectors, Options(1, "relu"))(x.requires_grad_(), residual).requires_grad
    residual.requires_grad_()
    Operator(vectors, Options(1, "relu"))(x.detach(), residual).sum().backward()
    assert residual.grad is not None


def test_the_gradient_of_the_shortcut_is_the_results():
    """The same tensor, and without a call where nothing else wants one."""
    (x, _, shortcut, vectors), *_ = case(("layer_scale", "shortcut"), (3, 4, 5, 2), torch.float32)
    y = Operator(vectors, Options(1))(x, None, shortcut.requires_grad_())
    upstream = torch.rand_like(y)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(y, shortcut, upstream, retain_graph=True)
    assert grad.data_ptr() == upstream.data_ptr()
    assert calls.names == []


class Calls(TorchDispatchMode):
    """Records the operators called that write a tensor: what a GPU would launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (PROLOGUES[-1], Options(1)),
        (PROLOGUES[2], Options(1, "relu")),
        (PROLOGUES[2], Options(1, "relu", backward="identity")),
    ],
)
def test_one_call_forward_and_one_backward(names, options, monkeypatch):
    called = []
    for name in ("forward", "backward"):
        original = getattr(composition, name)
        monkeypatch.setattr(composition, name, lambda *a, n=name, f=original: (called.append(n), f(*a))[1])
    monkeypatch.setattr(operator, "_RUNNERS", {})
    (*tensors, vectors), *_ = case(names, (3, 4, 5, 2), torch.float32)
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    y = Operator(vectors, options)(*tensors)
    torch.autograd.grad(y, leaves, torch.rand_like(y))
    assert called == ["forward", "backward"]


def test_a_sum_that_nobody_wants_is_not_rounded():
    (x, residual, _, vectors), *_ = case(("residual",), (3, 4, 5, 2), torch.bfloat16)
    with Calls() as calls:
        composition.forward(x, residual, None, vectors, Options(1, "silu"))
    assert calls.names.count("aten._to_copy.default") == 3  # of x, the residual and y


@pytest.mark.parametrize("name", STREAMS)
def test_what_broadcasts_is_added_to_every_image(name):
    (x, *streams, vectors), *_ = case((name,), (3, 4, 5, 2), torch.float32)
    one = next(t for t in streams if t is not None)[:1].clone().requires_grad_()
    results = []
    for added in (one, one.expand_as(x)):
        y = Operator(vectors, Options(1, "silu"))(x, *(None if t is None else added for t in streams))
        results.append((y, *torch.autograd.grad(y.square().sum(), one)))
    torch.testing.assert_close(*results)


def test_a_norm_written_to_before_backward_is_noticed():
    (x, *_, vectors), *_ = case(("input_norm",), (3, 4, 5, 2), torch.float32)
    y = Operator(vectors, Options(1, "silu"))(x.requires_grad_())
    vectors.input_variance.mul_(2)
    with pytest.raises(RuntimeError, match="a norm or a LayerScale were changed between a forward pass and its"):
        y.sum().backward()


def test_what_belongs_together_is_checked_once_and_by_name():
    (x, residual, _, vectors), *_ = case(("residual",), (3, 4, 5, 2), torch.float32)
    with pytest.raises(ValueError, match="input_mean has 3 elements for 4 channels"):
        Operator(vectors._replace(input_mean=torch.ones(3)), Options(1))
    with pytest.raises(ValueError, match="norms have their channels at dim 1, the operator at dim 3"):
        Operator(vectors._replace(sum_mean=torch.ones(4)), Options(3))
    with pytest.raises(ValueError, match="variant must be one of mean, edge, smooth, got 'none'"):
        Operator(vectors, Options(1, variant="none"))
    with pytest.raises(ValueError, match=r"no activation 'swoosh': one of .*relu"):
        Operator(vectors, Options(1, "swoosh"))
    with pytest.raises(ValueError, match="prelu takes a weight, a learned slope"):
        Operator(vectors, Options(1, "prelu"))
    with pytest.raises(ValueError, match="silu takes no weight, a learned slope"):
        Operator(vectors._replace(weight=torch.ones(4)), Options(1, "silu"))
    with pytest.raises(ValueError, match="threshold has 4 elements for 1 channels"):
        Operator(vectors._replace(centre=torch.ones(1)), Options(1))
    with pytest.raises(ValueError, match="layer_scale has 1 elements for 4 channels"):
        Operator(vectors._replace(layer_scale=torch.ones(1)), Options(1))
    one, four = (Operator(vectors._replace(weight=torch.full((n,), 0.2)), Options(1, "prelu")) for n in (1, 4))
    assert torch.equal(one(x), four(x)), "a slope is one for all channels, or one each"
    operator_ = Operator(vectors, Options(1))
    with pytest.raises(ValueError, match="x has 3 channels at dim 1, the operator 4"):
        operator_(x[:, :3])
    with pytest.raises(ValueError, match=r"a tensor of shape \[2, 4, 5, 2\] beside one of shape \[3, 4, 5, 2\]"):
        operator_(x, residual[:2])


class Particular:
    """A lowering whose runners take tensors like those that they were made for, and no others: as kernels do."""

    @staticmethod
    def forward_runner(vectors, options, *made_for):
        known = [operator._described(t) for t in (*made_for, *vectors)]

        def run(vectors, *tensors):
            assert [operator._described(t) for t in (*tensors, *vectors)] == known
            return composition.forward(*tensors, vectors, options)

        return run

    @staticmethod
    def backward_runner(vectors, options, x, grad, grad_sum, residual, from_sum, wanted):
        made_for = x, grad, grad_sum, residual
        known = [operator._described(t) for t in (*made_for, *vectors)]

        def run(vectors, *tensors):
            assert [operator._described(t) for t in (*tensors, *vectors)] == known
            return composition.backward(*tensors, vectors, options, from_sum, wanted)

        return run


@pytest.mark.parametrize("want_sum", [False, True])
def test_what_runs_a_call_was_made_for_tensors_like_its_own(want_sum, monkeypatch):
    """Calls in turns that differ in shapes, layouts, dtypes, what stands beside x, what is read and what was kept."""
    monkeypatch.setattr(operator, "_fast_lowering", lambda *_: Particular)
    monkeypatch.setattr(operator, "_RUNNERS", {})
    (*tensors, vectors), *_ = case(("residual", "shortcut"), (3, 4, 5, 2), torch.float32)
    options = Options(1, "silu", want_sum=want_sum)
    spread = Vectors(*(torch.stack([v, v], 1)[:, 0] for v in vectors[:2]))  # with gaps
    calls = [Operator(vectors, options), Operator(spread, options)]
    layouts, dtypes, beside = [*LAYOUTS.values()][:2], (torch.float32, torch.float64), [(0, 0), (0, 1), (1, 0), (1, 1)]
    kinds = [*itertools.product(calls, layouts, layouts, dtypes[:1], (3,), beside)]
    kinds += itertools.product(calls[:1], layouts[:1], layouts[:1], dtypes, (2, 3), beside)
    for call, own, other, dtype, rows, which in kinds * 2:
        laid_out = (layout(t[:rows].to(dtype)) for t, layout in zip(tensors, (own, other, other), strict=True))
        x, *streams = (t.requires_grad_() for t in laid_out)
        given = x, *(t if there else None for t, there in zip(streams, which, strict=True))
        for kept in (*layouts, lambda t: t):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, kept):
                results = call(*given) if want_sum else (call(*given),)
            for grads in itertools.product(
                (own(torch.ones_like(x)), other(torch.ones_like(x)), None), repeat=len(results)
            ):
                read = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
                if read:
                    leaves = [t for t in given if t is not None]
                    torch.autograd.grad(
                        [y for y, _ in read], leaves, [grad for _, grad in read], retain_graph=True, allow_unused=True
                    )


def test_of_ever_new_sizes_few_are_remembered(monkeypatch):
    """No more than the limit, by an operator and by all of them together; what was forgotten is found again."""
    monkeypatch.setattr(operator, "_LIMIT", 2)
    monkeypatch.setattr(operator, "_RUNNERS", runners := {})
    (x, _, _, vectors), *_ = case((), (3, 4, 5, 2), torch.float32)
    call = Operator(vectors, Options(1, "relu"))
    expected = call(x)
    for count in (1, 2, 3, 1, 2, 3):
        assert torch.equal(call(x[:count]), expected[:count])
        assert max(len(call._calls), len(runners)) <= 2
