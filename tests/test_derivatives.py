"""Derivatives: a transformed model has its base's, through backwards of the model's own, gradient modes and hooks."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import meansparse_fx as msfx
from meansparse_fx.capture import ROUTES, capture
from meansparse_fx.capture.recording import record
from meansparse_fx.errors import CaptureError, SiteError
from meansparse_fx.export import to_exported_program
from meansparse_fx.rewrite import sharing_copy
from tests.models import Functional

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gradients(model, images=IMAGES):
    """Return the output and the gradients with respect to images and parameters, by name."""
    images = images.clone().requires_grad_()
    output = model(images)
    wanted = {"images": images} | {
        n.removeprefix("_orig_mod."): p for n, p in model.named_parameters() if p.requires_grad
    }
    if not output.requires_grad:
        return {"output": output} | dict.fromkeys(wanted)
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {"output": output} | {name: tensor.grad for name, tensor in wanted.items()}


def assert_same(model, other, images=IMAGES):
    expected, actual = gradients(model, images), gradients(other, images)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        same = actual[name] is None if value is None else actual[name] is not None and torch.equal(actual[name], value)
        assert same, name


# Backwards of a model's own.


class Round(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 7) / 7

    @staticmethod
    def backward(ctx, g):
        return g


class Quantised(Function):
    """With an argument that is no tensor, saved tensors, and a gradient that is masked."""

    @staticmethod
    def forward(ctx, x, levels, low=0.0):
        ctx.save_for_backward(x)
        ctx.levels, ctx.low = levels, low
        return torch.round(x.clamp(low, 1) * levels) / levels

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ((x > ctx.low) & (x < 1)) * ctx.levels, None, None


class Reversed(Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.strength * g, None


class Scaled(Function):
    """In the newer style, with a default."""

    @staticmethod
    def forward(x, factor=0.25):
        return x * 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class Both(Function):
    """Two tensors in, two out."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x + y, x * y

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return g + h * y, 2 * g + h * x


class WithIndices(Function):
    @staticmethod
    def forward(ctx, x):
        sign = torch.sign(x - 0.5)
        ctx.mark_non_differentiable(sign)
        return torch.round(x * 5) / 5, sign

    @staticmethod
    def backward(ctx, g, unused):
        return 3 * g


class WithIndicesNewer(WithIndices):
    @staticmethod
    def forward(x):
        return torch.round(x * 5) / 5, torch.sign(x - 0.5)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])


class InPlace(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 5


class Inner:
    class Signed(Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        def backward(ctx, g):
            return g.clamp(-1, 1)


round_ste = Round.apply  # as people keep it


@torch.no_grad()
def rounded(x):
    return torch.round(x * 7) / 7


def by_no_grad(x):
    with torch.no_grad():
        step = torch.round(x * 7) / 7 - x
    return x + step


@torch.enable_grad()
def again(x):
    return x * x


def by_set_grad_enabled(x):
    with torch.set_grad_enabled(False):
        y = x * 2
        with torch.enable_grad():
            z = x * 3
    return x + y * z


def by_function_call(x):
    torch.set_grad_enabled(False)
    y = x * 2
    torch.set_grad_enabled(True)
    return x * y


def nested_modes(x):
    with torch.no_grad():
        y = rounded(x)
        z = again(x) + y
        with torch.no_grad():
            y = y + z
    return x * y + z


def in_place_without_gradient(x):
    y = x * 1
    with torch.no_grad():
        y.mul_(2)
    return y


def without_tracking(x):
    with torch.inference_mode():
        y = torch.round(x)
    return x + y.clone()


def hooked(x):
    y = x * 2
    y.register_hook(lambda g: g * 0.5)
    return y + x


def clipped(g, bound=1e-3):
    return g.clamp(-bound, bound)


def hooked_by_name(x):
    y = x * 2
    y.register_hook(clipped)
    return y


def unhooked(x):
    y = x * 2
    handle = y.register_hook(clipped)
    handle.remove()
    return y


def two_and_two(x):
    total, product = Both.apply(x, x * 2)
    return total - product


def checkpointed(x):
    return checkpoint(lambda x: torch.sin(x) * x, x, use_reentrant=False)


def checkpointed_reentrant(x):
    return checkpoint(lambda x: torch.sin(Round.apply(x)) * x, x, use_reentrant=True)


FRONTS = {
    "function": Round.apply,
    "function under a name": lambda x: round_ste(x),
    "arguments": lambda x: Quantised.apply(x, 15),
    "all arguments": lambda x: Quantised.apply(x, 15, 0.25),
    "reversal": lambda x: Reversed.apply(x, 0.5),
    "newer style": lambda x: Scaled.apply(x) + Scaled.apply(x, 3.0),
    "two and two": two_and_two,
    "one of two": lambda x: Both.apply(x, 2 * x)[1],
    "indices": lambda x: WithIndices.apply(x)[0] * WithIndices.apply(x)[1],
    "indices, newer style": lambda x: torch.stack(WithIndicesNewer.apply(x)).sum(0),
    "in place": lambda x: InPlace.apply(x * 1),
    "nested class": lambda x: Inner.Signed.apply(x - 0.5),
    "forward by name": lambda x: Round.forward(None, x) + x,
    "detach": lambda x: x + (torch.round(x * 7) / 7 - x).detach(),
    "data": lambda x: x + (torch.round(x * 7) / 7 - x).data,
    "no_grad": by_no_grad,
    "decorator": lambda x: x + (rounded(x) - x),
    "set_grad_enabled": by_set_grad_enabled,
    "set_grad_enabled, called": by_function_call,
    "nested": nested_modes,
    "in place without gradient": in_place_without_gradient,
    "inference_mode": without_tracking,
    "partly detached": lambda x: x * x.detach(),
    "all detached": lambda x: x.detach(),
    "hook": hooked,
    "hook by name": hooked_by_name,
    "hook removed": unhooked,
    "checkpoint": checkpointed,
    "reentrant checkpoint": checkpointed_reentrant,
}


class Front(nn.Module):
    """One of the functions above, before a network or inside of it, without and with a question about shapes."""

    def __init__(self, name, asks=False):
        super().__init__()
        self.name, self.asks = name, asks
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        if self.asks:
            x = x if x.shape[1] == 3 else x.repeat(1, 3, 1, 1)
        x = self.norm(self.conv(FRONTS[self.name](x)))
        return self.head(FRONTS[self.name](self.act(x)).flatten(1))


def network(name, asks=False):
    torch.manual_seed(0)
    return Front(name, asks).eval()


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("name", FRONTS)
def test_a_models_own_derivatives_survive(name, asks):
    model = network(name, asks)
    sparse = msfx.transform(model, IMAGES)
    assert sparse.meta["plan"].route == ROUTES[1 if asks else 0].name
    assert [s.name for s in sparse.meta["plan"].active] == ["act"]
    for other in (sparse, msfx.restore(sparse), copy.deepcopy(sparse)):
        assert_same(model, other)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["no_grad", "nested", "in place without gradient", "inference_mode"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_around_it_are_left_as_they_were(name, mode):
    model = network(name)
    sparse = msfx.transform(model, IMAGES)
    expected = model(IMAGES)
    with mode():
        assert torch.equal(sparse(IMAGES), expected)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.is_grad_enabled()


def test_a_failure_leaves_the_gradient_mode_as_it_was():
    def forward(self, x):
        with torch.no_grad():
            y = self.last(x)
        return self.act(self.conv(x)) + y.mean()

    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), last=nn.Linear(8, 8)).eval()
    sparse = msfx.transform(model, IMAGES)
    for own in (sparse, copy.deepcopy(sparse), msfx.restore(sparse)):
        own.last.weight = nn.Parameter(torch.zeros(8, 9))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            own(IMAGES)
        assert torch.is_grad_enabled()


class Residual(nn.Module):
    """A norm, a sum and an activation that a fusion would take together; gradients are off for one part."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def within(self, part):
        return torch.no_grad() if part == self.part else contextlib.nullcontext()

    def forward(self, x):
        y = self.conv(x)
        with self.within("norm"):
            y = self.norm(y)
        with self.within("sum"):
            y = y + x
        with self.within("act"):
            z = self.act(y)
        with self.within("last"):
            z = z + x
        return (z + y).sum((2, 3))


@pytest.mark.parametrize("part", ["norm", "sum", "act", "last"])
def test_fusions_leave_gradient_modes_where_they_are(part):
    torch.manual_seed(0)
    model = Residual(part).eval().requires_grad_(False)
    fused = msfx.transform(model, IMAGES, fuse="all")
    expected, actual = gradients(model), gradients(fused)
    torch.testing.assert_close(actual, expected)
    assert_same(model, msfx.restore(fused))


# What else becomes of a graph.


def test_what_is_made_in_inference_mode_works_outside_of_it():
    model = network("function")
    with torch.inference_mode():
        sparse = msfx.transform(model, IMAGES.clone())
    assert_same(model, sparse)
    msfx.calibrate(sparse, [IMAGES], progress=False)
    msfx.set_alpha(sparse, 0.5)
    assert gradients(sparse)["images"].abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["function", "all arguments", "nested class", "nested", "inference_mode", "hook by name"]
)
@pytest.mark.parametrize("asks", [False, True])
def test_it_can_be_pickled(name, asks):
    model = network(name, asks)
    sparse = pickle.loads(pickle.dumps(msfx.transform(model, IMAGES)))
    assert_same(model, sparse)
    assert_same(model, pickle.loads(pickle.dumps(sparse)))


def test_a_fused_model_has_them_before_fusion_too():
    model = network("function").requires_grad_(False)
    fused = msfx.transform(model, IMAGES, fuse="all")
    assert_same(model, sharing_copy(fused))
    assert_same(model, msfx.restore(fused))
    torch.testing.assert_close(gradients(fused), gradients(model))


@pytest.mark.parametrize(
    ("name", "lost"), [("function", "Round would"), ("hook", "a tensor hook would"), ("no_grad", "no_grad would")]
)
def test_an_exported_program_says_that_it_has_none_of_them(name, lost):
    model = network(name)
    sparse = msfx.transform(model, IMAGES)
    msfx.calibrate(sparse, [IMAGES], progress=False)
    with pytest.warns(UserWarning, match=f"exported for inference: {lost} give the model other gradients"):
        program = to_exported_program(sparse, IMAGES)
    assert torch.equal(program.module()(IMAGES), gradients(model)["output"])


@pytest.mark.parametrize("name", ["function", "two and two", "no_grad", "nested", "hook"])
def test_compiled_by_the_plug_in(name):
    torch.compiler.reset()
    model = network(name)
    compiled = torch.compile(model, backend="meansparse", options={"inner": "eager"})
    assert_same(model, compiled)
    assert [s.name for s in msfx.compile_report(compiled).plan.active] == ["act"]


@pytest.mark.parametrize("name", ["function", "newer style", "nested"])
def test_transformed_and_compiled(name):
    torch.compiler.reset()
    model = network(name)
    assert_same(model, torch.compile(msfx.transform(model, IMAGES), backend="aot_eager"))


# Models whose backward is a library's, and parameters that want nothing.


class Weighted(nn.Module):
    """Its weights pass through a backward of their own, and one of them is frozen."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        x = F.conv2d(x, Round.apply(self.conv.weight), self.conv.bias)
        x = self.last(self.act(x)) * self.scale.detach() + self.scale
        return x.sum((2, 3))


def test_backwards_of_weights_and_frozen_ones():
    torch.manual_seed(0)
    model = Weighted().eval()
    captured = capture(model, IMAGES)
    assert captured.checked == "operations"
    assert_same(model, captured.graph_module)
    assert_same(model, msfx.transform(model, IMAGES))
    assert gradients(model)["conv.weight"].abs().sum() > 0


def test_timms_memory_efficient_activations():
    activations = pytest.importorskip("timm.layers.activations_me")
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 4, 3)]
    for kind in (activations.SwishMe, activations.MishMe, activations.HardSwishMe, activations.HardMishMe):
        parts += [nn.Conv2d(4, 4, 1), kind()]
    model = nn.Sequential(*parts, nn.Flatten()).eval()
    sparse = msfx.transform(model, IMAGES)
    assert len(sparse.meta["plan"].active) == 4
    assert_same(model, sparse)


# What cannot be kept is refused, with the line.


class Guided(Function):
    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(min=0)


class Written(Function):
    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx, g):
        return g, None


@pytest.mark.parametrize(("function", "others"), [(Guided, ()), (Written, (1.0,))])
def test_an_activation_inside_of_a_function_is_left_to_it(function, others):
    def forward(self, x):
        return self.act(function.apply(self.conv(x), *others))

    torch.manual_seed(0)
    model = Functional(forward, conv=nn.Conv2d(3, 4, 3), act=nn.GELU()).eval()
    sparse = msfx.transform(model, IMAGES)
    guided, act = sparse.meta["plan"]
    assert act.skipped is None
    assert not guided.activation.fused
    assert guided.skipped == (
        f"own backward: an activation inside of {function.__name__}, "
        "a torch.autograd.Function, which has its own gradient"
    )
    assert_same(model, sparse)


def refusal(function, **children):
    torch.manual_seed(0)
    with pytest.raises(CaptureError) as caught:
        capture(Functional(function, **children).eval(), IMAGES)
    message = str(caught.value)
    assert f"{__file__}:{function.__code__.co_firstlineno + 2}, " in message
    return message


def assigned(self, x):
    y = F.relu(x)
    y.data = torch.round(y.data)
    return y


def unwanted(self, x):
    y = F.relu(x)
    y.requires_grad = False
    return y


def holding_a_module(self, x):
    y = F.relu(x)
    y.register_hook(lambda g: g * self.factor)
    return y


def holding_a_tensor(self, x):
    y = F.relu(x)
    y.register_hook(lambda g: g * y)
    return y


def asking(self, x):
    y = F.relu(x)
    return y if torch.is_grad_enabled() else y * 1


def asking_a_tensor(self, x):
    y = F.relu(x)
    return y if y.grad_fn is None else y * 2


def packed(self, x):
    y = F.relu(x) * 2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2 if t.dim() == 4 else t, lambda t: t):
        return y * torch.sin(y)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (assigned, "an assignment to .data, which no graph holds; it changes a value and no gradient"),
        (
            unwanted,
            "an assignment to .requires_grad, which no graph holds; it changes what gradients flow to: write x.d",
        ),
        (holding_a_module, "a tensor hook holds Functional, which is another one in a copy of the model"),
        (holding_a_tensor, "a tensor hook holds a tensor that the model computes"),
        (asking_a_tensor, ".grad_fn asks whether gradients are wanted, which one graph cannot answer for all"),
        (asking, "a branch asks whether gradients are wanted, which one graph cannot answer for all"),
    ],
)
def test_what_a_graph_cannot_keep_names_its_line(function, reason):
    assert reason in refusal(function)


def test_a_graph_with_the_values_and_other_gradients_is_refused():
    message = refusal(packed)
    assert (
        "has the model's values on a batch of 2, but not its gradients with respect to the images: they part" in message
    )


class Differentiating(nn.Module):
    """Follows its own gradient, as energy models and purifiers do."""

    def __init__(self, around):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.around = nn.Conv2d(3, 4, 3), around

    def forward(self, x):
        with self.around():
            x = x.detach().requires_grad_()
            (step,) = torch.autograd.grad(F.relu(self.conv(x)).square().sum(), x, create_graph=True)
        return F.relu(self.conv(x + 0.1 * step))


def test_a_model_that_differentiates_itself():
    model = Differentiating(torch.enable_grad).eval()
    sparse = msfx.transform(model, IMAGES)
    assert_same(model, sparse)
    statistics = msfx.calibrate(sparse, [IMAGES], progress=False)
    seen = []
    with torch.enable_grad():
        model.conv.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        model(IMAGES)
    for name, values in zip(("relu", "relu_1"), seen, strict=True):
        torch.testing.assert_close(statistics[name].mean.float(), values.mean((0, 2, 3)))


def test_a_model_that_differentiates_itself_unasked_is_refused():
    with pytest.raises(SiteError, match=r"fails under torch.no_grad.* goes under torch.enable_grad"):
        msfx.transform(Differentiating(contextlib.nullcontext).eval(), IMAGES)


# What a recording says of derivatives, where values are the same.

WEIGHT = nn.Parameter(torch.linspace(-1, 1, 8))


def recorded(function):
    with torch.enable_grad():
        return record(function, IMAGES, {"weight": WEIGHT}, {})


def hook(factor):
    def forward(x):
        y = x * 2
        y.register_hook(lambda g: g * factor)
        return y

    return forward


def in_place_with_gradient(x):
    y = x * 1
    y.mul_(2)
    return y


def through_a_view(x):
    y = x * 1
    y[:, 0].mul_(2)
    return y + x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 2, lambda x: (x * 2).detach()),
        (lambda x: x * x, lambda x: x * x.detach()),
        (Round.apply, lambda x: Round.forward(None, x)),
        (lambda x: Reversed.apply(x, 0.5), lambda x: Reversed.apply(x, 1.0)),
        (lambda x: Reversed.apply(x, 1.0), lambda x: x.view_as(x)),
        (hook(2), lambda x: x * 2),
        (hook(2), hook(3)),
        (in_place_with_gradient, in_place_without_gradient),
        (lambda x: x * (WEIGHT * 2), lambda x: x * (WEIGHT * 2).detach()),
        (lambda x: x * (WEIGHT * 2), lambda x: x * (WEIGHT + WEIGHT)),
        (lambda x: x * (WEIGHT * WEIGHT), lambda x: x * (WEIGHT * WEIGHT.detach())),
        (lambda x: x * (WEIGHT * WEIGHT.detach()), lambda x: x * (WEIGHT.detach() * WEIGHT)),
        (lambda x: x * Round.apply(WEIGHT), lambda x: x * Round.forward(None, WEIGHT)),
    ],
)
def test_recordings_differ_in_derivatives_alone(one, other):
    wanting = IMAGES.clone().requires_grad_()
    assert torch.equal(one(wanting), other(wanting))
    assert recorded(one) == recorded(one)
    assert recorded(other) == recorded(other)
    assert recorded(one) != recorded(other)


def test_recordings_of_the_same_derivatives():
    assert recorded(hook(2)) == recorded(hook(2))
    assert recorded(in_place_with_gradient) == recorded(lambda x: x * 1 * 2)
    assert recorded(through_a_view) == recorded(through_a_view)
    assert recorded(checkpointed) == recorded(lambda x: torch.sin(x) * x)
    assert recorded(checkpointed_reentrant) == recorded(lambda x: torch.sin(Round.apply(x)) * x)


class Autocasting(nn.Module):
    """In bfloat16, a part of it in float32 again; behind it float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.GELU(), nn.Linear(4 * 36, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.act(self.conv(x)).flatten(1)
            with torch.autocast("cpu", enabled=False):
                y = x.float() @ self.head.weight.T
            y = y + self.head(x)
        return torch.softmax(y @ y.T, 1) @ y


@torch.autocast("cpu", dtype=torch.bfloat16)
def decorated(self, x):
    return self.act(self.conv(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_autocast_inside_of_a_model():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for model in (Autocasting().eval(), Functional(decorated, conv=nn.Conv2d(3, 4, 3), act=nn.GELU()).eval()):
        sparse = msfx.transform(model, images)
        for around in (False, True):  # an attack's amp= around it
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                assert torch.equal(sparse(images), model(images))
        stats = msfx.calibrate(sparse, [images], progress=False)
        msfx.set_alpha(sparse, 0.2)
        expected = sparse(images)
        if torch.__version__ >= (2, 14):  # Dynamo did not know the calls that enter autocast
            assert torch.equal(torch.compile(sparse, backend="eager", fullgraph=True)(images), expected)
        assert torch.equal(to_exported_program(sparse, images).module()(images), expected)
        if not isinstance(model, Functional):  # which holds a function, and no pickle does
            assert torch.equal(pickle.loads(pickle.dumps(sparse))(images), expected)
        options = {"statistics": stats, "alpha": 0.2, "inner": "eager"}
        assert torch.equal(torch.compile(model, backend="meansparse", options=options)(images), expected)


def test_a_failure_leaves_autocast_as_it_was():
    sparse = msfx.transform(Autocasting().eval(), torch.rand(4, 3, 8, 8))
    for images in (torch.rand(4, 3, 9, 9), torch.rand(4, 2, 8, 8)):  # inside of the inner one, and of the outer
        with pytest.raises(RuntimeError):
            sparse(images)
        assert not torch.is_autocast_enabled("cpu")
        assert torch.autocast_increment_nesting() == 1
        torch.autocast_decrement_nesting()
