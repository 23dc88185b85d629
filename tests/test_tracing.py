"""Tracing by example: what the images answer, what stays in the graph, and what is refused."""

import builtins
import copy
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.transforms import v2

import meansparse_fx as msfx
from meansparse_fx.capture import ROUTES, capture
from meansparse_fx.capture.counting import count_activations
from meansparse_fx.capture.examples import trace_by_example
from meansparse_fx.capture.tracing import trace
from meansparse_fx.errors import CaptureError, StateError
from meansparse_fx.sites import find_sites
from tests.models import Functional

IMAGES = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
BY_EXAMPLE = ROUTES[1].name
GREATEST = 9.0


def captured_by_example(function, activations=1, **children):
    """Return the graph of a function that only the route by example takes, checked at batch sizes it has not seen."""
    model = Functional(function, **children).eval()
    captured = capture(model, IMAGES)
    assert captured.route == BY_EXAMPLE
    assert count_activations(captured.graph_module) == activations
    for n in (1, 5):
        batch = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))
        assert torch.equal(captured.graph_module(batch.clone()), model(batch.clone()))
    return captured.graph_module


def targets(graph_module):
    return [n.target for n in graph_module.graph.nodes]


# What the images answer.


def test_shapes():
    def forward(self, x):
        if x.shape[-1] > 4 and x.size(1) == 4 and x.dim() == x.ndim == len(x.shape) and x.shape[1:].numel() == 256:
            x = F.pad(x, (0, x.shape[2] % 3))
        return F.relu(x)

    nodes = targets(captured_by_example(forward))
    assert F.pad in nodes
    assert getattr not in nodes  # no question is left in the graph


def test_dtype_and_device():
    def forward(self, x):
        if x.is_cuda or x.dtype != torch.float32 or not x.is_floating_point() or x.device.type == "meta":
            return x
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.relu(x + torch.ones(4, 8, 8, device=x.device, dtype=x.dtype))

    captured_by_example(forward)


def test_tuples_of_known_length():
    def forward(self, x):
        parts = torch.split(x, 2, dim=1)
        a, b = x.chunk(2, dim=1)
        assert len(parts) == 2
        assert isinstance(parts, tuple)
        return F.relu(sum(parts) + sum(p * q for p, q in zip(parts, [a, b], strict=True)) + x.max(2).values.mean())

    captured_by_example(forward)


def test_it_is_a_tensor():
    def forward(self, x):
        if not isinstance(x, torch.Tensor) or not torch.is_tensor(x) or not isinstance(x.shape[0], int):
            raise TypeError(type(x))
        return F.relu(x)

    captured_by_example(forward)


class Coefficients(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.25))
        self.register_buffer("on", torch.tensor(True))
        self.register_buffer("steps", torch.tensor(2))


def test_values_of_parameters_and_buffers():
    def forward(self, x):
        if self.own.weight.item() > 0 and (self.own.weight * 2 == 0.5) and self.own.on:
            for _ in range(self.own.steps):
                x = x * float(self.own.weight.detach()) + int(self.own.steps)
        return F.relu(x * self.own.weight)

    graph_module = captured_by_example(forward, own=Coefficients())
    assert "own.weight" in targets(graph_module)  # the graph still reads what is no question
    assert "item" not in targets(graph_module)


@pytest.mark.parametrize("copier", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_other_weights_than_answered_the_model_are_not_loaded(copier):
    """The branch and the number were the old ones, silently."""

    def forward(self, x):
        return F.relu(x if self.own.on else -x) * self.own.steps.item() * self.own.weight

    model = Functional(forward, own=Coefficients()).eval()
    sparse = copier(msfx.transform(model, IMAGES, placement=msfx.Placement(channel_dims={"relu": 1})))
    weights = model.state_dict()
    sparse.load_state_dict({**sparse.state_dict(), **weights, "own.weight": torch.tensor(3.0)})  # read by the graph
    assert torch.equal(sparse(IMAGES), model(IMAGES) * 12)
    for name, other in (("own.on", False), ("own.steps", 3)):
        with pytest.raises(StateError, match=f"a branch of {name}, and the graph holds for the value it had"):
            sparse.load_state_dict({**weights, name: torch.tensor(other)}, strict=False)
    with pytest.raises(StateError, match=r"own.steps"):
        sparse.load_state_dict({**weights, "own.steps": torch.tensor(3)}, strict=False, assign=True)
    sparse.load_state_dict(weights, strict=False)


def test_sizes_computed_by_numpy():
    def forward(self, x):
        if x.shape[1] == 4:
            x = x.reshape(-1, np.prod((2, 2)), 64)
        return F.relu(x)

    captured_by_example(forward)


# What stays in the graph.


def windows_back(windows, side, height, width):
    batch = int(windows.shape[0] / (height * width / side / side))
    x = windows.view(batch, height // side, width // side, side, side, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def test_numbers_that_depend_on_the_batch():
    def forward(self, x):
        n, c, h, w = x.shape
        assert h == 8, "a branch, which the routes before do not take"
        windows = x.view(n, c, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(n * 4, 16, c)
        return F.relu(windows_back(windows, 4, h, w))

    graph_module = captured_by_example(forward)
    assert int in targets(graph_module)
    assert "int" not in globals()  # the other one was there while tracing only
    assert pickle.loads(pickle.dumps(graph_module))(IMAGES).equal(graph_module(IMAGES))


def test_arithmetic_on_the_batch_size():
    def forward(self, x):
        n = len(x)
        assert x.shape[2] == 8
        assert n > 0
        assert n * 256 == x.numel()
        assert divmod(x.shape[2], 3) == (2, 2)
        rows = max(2 * n // 2, 0) + math.floor(n / 1000) + divmod(n, 1)[1]
        rows = rows + float(n) - n
        return F.relu(x).reshape(round(rows), -1) + torch.zeros(n, 256) + torch.arange(n)[:, None]

    graph_module = captured_by_example(forward)
    assert len in targets(graph_module)


def test_in_place_statements():
    def forward(self, x):
        h = F.relu(x)
        k = h
        h += 1
        h[:, :2] = 0.5
        h[:, 2:] *= 2
        return k * 2 + h

    captured_by_example(forward)


CHECKS = """
def forward(self, x):
    assert not torch.isnan(x).any(), "NaN"
    assert x.max() < 9
    assert x.min() > -9 and x.max() < 9
    if x.max() > 9:
        raise ValueError(f"{x.shape} is too bright")
    return F.relu(x if x.shape[1] == 4 else -x)
"""


def test_checks_of_values_pass():
    namespace = {"torch": torch, "F": F}
    exec(CHECKS, namespace)  # outside of this file, whose assertions pytest rewrites
    captured_by_example(namespace["forward"])


def test_modules_without_a_path():
    shared = [nn.ReLU(), nn.Sigmoid()]

    def forward(self, x):
        return shared[1](shared[0](x if x.shape[1] == 4 else -x))

    captured_by_example(forward)


def test_operators_that_need_data():
    def forward(self, x):
        positive = torch.nonzero(x.flatten() > 0)  # as many rows as there are positive values
        return F.relu(x if x.shape[1] == 4 else -x) + positive.shape[0]

    assert torch.nonzero in targets(captured_by_example(forward))


def test_sizes_that_depend_on_values_are_not_baked_in():
    model = Functional(lambda self, x: F.relu(x[:, :3] if x.shape[1] > 3 else x) + torch.unique(x).shape[0]).eval()
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 0]])
    captured = capture(model, tokens)
    assert captured.route == BY_EXAMPLE
    assert torch.equal(captured.graph_module(tokens[1:]), model(tokens[1:]))


def test_leaves_stay_where_they_do_no_harm():
    class Judging(nn.Module):
        def forward(self, x):
            return x * 2 if x.mean() > 0 else x

    def forward(self, x):
        return F.relu(self.judge(x) if x.shape[1] == 4 else x)

    assert "judge" in targets(captured_by_example(forward, judge=Judging()))


def test_whether_gradients_are_wanted_is_decided_when_it_runs():
    class Smoothed(nn.Module):
        def forward(self, x):
            return x if x.grad_fn is None else 2 * x

    def forward(self, x):
        return F.relu(self.smoothed(x + 1) if x.shape[1] == 4 else x)

    graph_module = captured_by_example(forward, smoothed=Smoothed())
    x = IMAGES.clone().requires_grad_()
    assert torch.equal(graph_module(x), 2 * graph_module(IMAGES))


class Reweighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.weight = nn.Parameter(self.conv.weight.detach().clone())
        del self.conv.weight

    def forward(self, x):
        self.conv.weight = self.weight * 2
        scale = 1 + self.conv.bias.square() + x.mean()
        return F.relu(torch.func.functional_call(self.norm, {"weight": scale}, (self.conv(x),)))


def test_weights_that_forward_gives_to_modules():
    model = Reweighted().eval()
    graph_module = capture(model, IMAGES).graph_module
    a, b = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    expected, actual = model(a), graph_module(b)
    assert torch.equal(actual, expected)
    wanted = (torch.autograd.grad(y.square().sum(), (x, *m.parameters()), allow_unused=True)
              for m, x, y in ((model, a, expected), (graph_module, b, actual)))  # fmt: skip
    for own, other in zip(*wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


# What is refused.


def refusal(function, **children):
    with pytest.raises(CaptureError) as caught:
        capture(Functional(function, **children).eval(), IMAGES)
    message = str(caught.value)
    assert message.count("symbolic trace stopped") == 1
    assert 'torch.compile(model, backend="meansparse")' in message
    return message


def by_value(self, x):
    return F.relu(x) if x.sum() > GREATEST else F.relu(-x)


def by_number_of_value(self, x):
    return F.relu(x if x.shape[1] == 4 else -x) * x.mean().item()


def by_batch_size(self, x):
    return F.relu(x) if x.shape[0] == 2 else F.relu(x) * 2


def by_counting_images(self, x):
    return torch.stack([F.relu(x[i]) for i in range(x.shape[0])])


def by_each_image(self, x):
    return torch.stack([F.relu(image) for image in x])


def by_number_found(self, x):
    found = x[x > 2].shape[0]  # none here, and in both example batches fewer than there are images
    return F.relu(x) if found < GREATEST else F.relu(x) * 1


def by_transform(self, x):
    y = x if x.shape[1] == 4 else -x
    return F.relu(x + torch.func.grad(lambda z: (z * y).sum())(x))


def by_reverse_transform(self, x):
    return F.relu(torch.func.vjp(lambda z: z * x.shape[1], x)[0])


def by_vmap(self, x):
    return F.relu(torch.vmap(lambda z: z * z.shape[0])(x))


def by_compiled_code(self, x):  # C++ that is given what claims to be a tensor
    y = x if x.shape[1] == 4 else -x
    return F.relu(torch._C._functorch.unwrap_if_dead(y))


def by_gradient(self, x):
    return F.relu(x) if x.requires_grad else F.relu(x) * 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_value, "depends on values that are computed from the images"),
        (by_number_of_value, r"item() asks for values that are computed from the images"),
        (by_batch_size, "a branch depends on the batch size: True for 2 and False for 3 images"),
        (by_counting_images, "a number is needed here, and it depends on the batch size"),
        (by_each_image, "a loop runs as often as there are images in a batch"),
        (by_number_found, "a branch depends on a number that is computed from the images"),
        (by_transform, "a transform of torch.func, which no graph holds, inside of forward"),
        (by_reverse_transform, "a transform of torch.func, which no graph holds, inside of forward"),
        (by_vmap, "a transform of torch.func, which no graph holds, inside of forward"),
        (by_compiled_code, "incompatible function arguments"),
        (by_gradient, ".requires_grad asks whether gradients are wanted"),
    ],
)
def test_what_one_graph_cannot_answer_for_all_names_its_line(function, reason):
    message = refusal(function)
    assert reason in message
    last = function.__code__.co_firstlineno + 2
    assert f"{__file__}:{last}" in message or f"{__file__}:{last - 1}" in message


@pytest.mark.parametrize(
    ("decide", "others"),
    [
        (lambda n: 2 if n == 1 else 3, 1),
        (lambda n: 2 if n > 8 else 3, 9),
        (lambda n: min(n, 4), 5),
        (lambda n: max(n, 4), 8),
        (lambda n: n // 4 + 1, 4),
        (lambda n: math.ceil(n / 4), 5),
        (lambda n: 2 if n else 3, 0),
    ],
)
def test_batches_about_which_the_examples_say_nothing_are_refused(decide, others):
    """At 2 and 3 images all agree, so that the graph was taken for any number of them."""
    model = Functional(lambda self, x: F.relu(x) * decide(x.shape[0]) if x.shape[1] == 4 else x).eval()
    graph_module = capture(model, IMAGES).graph_module
    for copied in (graph_module, pickle.loads(pickle.dumps(graph_module))):
        with pytest.raises(CaptureError, match=rf"decides by the number of images, {__file__}:\d+.*without the batch"):
            copied(torch.randn(others, 4, 8, 8))
        assert torch.equal(copied(IMAGES), model(IMAGES))
    with pytest.raises(CaptureError, match="decides by the number of images"):
        find_sites(graph_module, BY_EXAMPLE, torch.randn(others, 4, 8, 8))


def squeezed(x):
    y = x.mean((2, 3)).squeeze()
    return y[None] if y.dim() == 1 else y


@pytest.mark.parametrize(
    ("asks", "refused"),
    [
        (lambda x: x * x[:2].shape[0], 1),
        (lambda x: x * F.relu(x[-2:]).flatten(1).size(0), 1),
        (lambda x: x * len(x[:2]), 1),
        (lambda x: x * sum(1 for _ in x[:2]), 1),
        (lambda x: x * (x.flatten(1) @ x.flatten(1).t())[:2].shape[0], 1),
        (lambda x: x * len(x.chunk(2)), 1),
        (lambda x: x * len(x[:2].unbind(0)), 1),
        (lambda x: torch.cat([F.relu(part) for part in x.split(8)]), 9),
        (squeezed, 1),
        (lambda x: x * x[0].shape[0] * x.mean(0).dim() * x[:1].size(0), None),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1) * x.mean((2, 3)).squeeze(-1).shape[1], None),
    ],
)
def test_sizes_on_which_the_examples_agree_by_their_number_alone(asks, refused):
    """``x[:2].shape[0]`` is 2 of 2 and of 3 images, and 1 of one."""
    model = Functional(lambda self, x: asks(F.relu(x)) if x.shape[1] == 4 else x).eval()
    graph_module = capture(model, IMAGES).graph_module
    for images in (IMAGES[:2], IMAGES, torch.randn(7, 4, 8, 8)):
        assert torch.equal(graph_module(images), model(images))
    if refused is None:
        assert torch.equal(graph_module(IMAGES[:1]), model(IMAGES[:1]))
    else:
        with pytest.raises(CaptureError, match="decides by the number of images"):
            graph_module(torch.randn(refused, 4, 8, 8))


@pytest.mark.parametrize(
    "asks",
    [
        lambda self, x: x.masked_fill(x < 0, torch.finfo(x.dtype).min / 16),
        lambda self, x: x if x.dtype is torch.float32 else -x,
        lambda self, x: x if self.layer.weight.dtype is torch.float32 else -x,
        lambda self, x: x * x.element_size(),
    ],
)
def test_images_of_another_dtype_than_forward_was_told_are_refused(asks):
    def forward(self, x):
        return F.relu(asks(self, x) if x.shape[1] == 4 else x)

    graph_module = captured_by_example(forward, layer=nn.Conv2d(4, 4, 1)).bfloat16()
    with pytest.raises(CaptureError, match=r"answered torch.float32 .* the images are torch.bfloat16: transform the"):
        graph_module(IMAGES.bfloat16())


def test_without_images_there_is_a_hint():
    with pytest.raises(CaptureError, match="To go on, pass example images"):
        capture(Functional(lambda self, x: F.relu(x) if x.shape[1] > 2 else x).eval())


def test_images_of_another_size_are_refused():
    graph_module = captured_by_example(lambda self, x: F.relu(x) if x.shape[1] > 2 else x)
    with pytest.raises(CaptureError, match=r"captured for images of shape \['N', 4, 8, 8\] and got \[2, 4, 9, 9\]"):
        graph_module(torch.zeros(2, 4, 9, 9))


# What is left behind.


class Everything(nn.Module):
    """A model with a question of each kind, state of its own, and two activations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.cache = {}

    def forward(self, x):
        self.calls += 1
        if x.shape[-1] not in self.cache:
            self.cache[x.shape[-1]] = x.new_zeros(x.shape[-1]) if self.gain.sum() > 0 else None
        x = self.act(self.conv(x)) * self.gain + self.cache[x.shape[-1]]
        return F.gelu(x).view(int(len(x) / 1), -1)


def test_the_model_is_left_as_it_was():
    model = Everything().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.random.get_rng_state()
    captured = capture(model, IMAGES)
    assert captured.route == BY_EXAMPLE
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert captured.graph_module.state_dict().keys() == before.keys()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.cache == {}
    assert not any(isinstance(v, fx.Proxy) for m in model.modules() for v in vars(m).values())
    assert not {"int", "float", "len"} & globals().keys()
    assert builtins.int is int


def test_names_are_those_of_the_plain_trace():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.act = nn.ReLU()

        def forward(self, x):
            x = self.act(self.act(self.conv(x)))
            return F.gelu(x) + x.tanh()

    model = nn.Sequential(Plain(), Plain()).eval()
    names = []
    for traced in (trace(model), trace_by_example(model, IMAGES)):
        graph_module = fx.GraphModule(traced.root, traced.graph)
        names.append([site.name for site in find_sites(graph_module, "", IMAGES)])
    assert names[0] == names[1]
    assert "1.act_1" in names[0]


def test_it_can_be_copied_and_pickled():
    graph_module = capture(Everything().eval(), IMAGES).graph_module
    expected = graph_module(IMAGES)
    for clone in (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        assert torch.equal(clone(IMAGES), expected)
        with pytest.raises(CaptureError, match="captured for images"):
            clone(IMAGES[..., 1:])
        with pytest.raises(CaptureError, match="captured for images"):
            find_sites(clone, "", IMAGES[..., 1:])


@pytest.mark.parametrize(
    "wide",
    [
        lambda self, x: self.norm(x.permute(0, 2, 3, 1)),
        lambda self, x: self.act(x[:, ::2]),
        lambda self, x: x[:, :1].expand(-1, 4, -1, -1) * 2,
    ],
)
def test_a_question_for_the_layout_is_answered_as_torch_would(wide):
    def forward(self, x):
        x = wide(self, self.conv(x))
        return F.relu(x) if x.is_contiguous() else F.gelu(x)

    model = Functional(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.LayerNorm(4), act=nn.SiLU()).eval()
    assert torch.equal(capture(model, IMAGES).graph_module(IMAGES), model(IMAGES))


# Real models with Python control flow: which route takes them, and how many activations they call.
_ZOO = [
    ("dm_nfnet_f0", 96, "symbolic trace", 64),
    ("maxvit_tiny_tf_224", 224, "symbolic trace", 57),
    ("vgg16_bn", 64, BY_EXAMPLE, 15),
    ("nasnetalarge", 96, "symbolic trace", 264),
    ("pnasnet5large", 96, "symbolic trace", 200),
    ("tf_efficientnet_b0", 64, "symbolic trace", 49),
    ("bat_resnext26ts", 256, BY_EXAMPLE, 59),
    ("convit_tiny", 224, "symbolic trace", 12),
    ("crossvit_tiny_240", 240, "symbolic trace", 27),
    ("twins_svt_small", 224, "symbolic trace", 18),
    ("efficientvit_b0", 64, BY_EXAMPLE, 32),
    ("hiera_tiny_224", 224, "symbolic trace", 12),
    ("mvitv2_tiny", 224, "symbolic trace", 10),
    ("nest_tiny", 224, "symbolic trace", 12),
    ("tiny_vit_5m_224", 224, BY_EXAMPLE, 23),
    ("mobilevit_s", 64, BY_EXAMPLE, 34),
    ("mobilevitv2_050", 64, BY_EXAMPLE, 34),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "route", "activations"), _ZOO, ids=[row[0] for row in _ZOO])
@pytest.mark.filterwarnings("ignore")
def test_models_of_timm(name, size, route, activations):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    images = torch.rand(2, 3, size, size)
    captured = capture(model, images)
    assert captured.route == route
    plan = find_sites(captured.graph_module, captured.route, images)
    assert len([site for site in plan if site.kind == "activation"]) == activations
    with torch.no_grad():
        assert torch.equal(captured.graph_module(images[:1]), model(images[:1]))


def test_torchvisions_transforms_are_called_as_they_are():
    """They change tensors and leave the rest alone, and a trace holds no tensors."""
    normalise = v2.Normalize([0.5] * 4, [0.2] * 4)
    for front in (normalise, v2.Compose([v2.Resize(6), v2.ToDtype(torch.float32, scale=True), normalise])):
        model = nn.Sequential(front, nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
        captured = capture(model, IMAGES)
        assert (captured.route, captured.checked) == ("symbolic trace", "operations")
        assert torch.equal(captured.graph_module(IMAGES), model(IMAGES))


def test_threads_may_transform_and_run_models_at_the_same_time():
    """What stands in for torch's functions while one was traced stayed there, and running models were traced along."""
    held = [(torch, "is_grad_enabled"), (nn.Module, "__call__"), (nn.Module, "__getattr__")]
    before = [getattr(owner, name) for owner, name in held]
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()) for _ in range(8))).eval()
    expected, interval = model(IMAGES), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            transformed = [pool.submit(lambda: msfx.transform(model, IMAGES)(IMAGES)) for _ in range(8)]
            ran = [pool.submit(lambda: [model(IMAGES) for _ in range(20)]) for _ in range(8)]
            results = [future.result() for future in transformed]
            results += [result for future in ran for result in future.result()]
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(result, expected) for result in results)
    assert [getattr(owner, name) for owner, name in held] == before
    assert "__getattribute__" not in vars(nn.Module)
