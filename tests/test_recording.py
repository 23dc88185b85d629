"""Recording: equal where two models compute the same, whatever the images hold, and never where they may not."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from meansparse_fx.capture import capture
from meansparse_fx.capture.recording import record
from meansparse_fx.dataless import NeedsData, tensors
from meansparse_fx.errors import CaptureError
from meansparse_fx.state import state_of
from tests.models import Functional

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def recorded(function, images=IMAGES, state=None):
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        return record(function, images, state or {}, {})


def of(function, **children):
    return Functional(function, **children).eval()


# What is the same.


def in_place(x):
    h = x * 2
    h += 1
    return F.relu(h, inplace=True)


def out_of_place(x):
    return F.relu(x * 2 + 1)


def test_in_place_or_not():
    assert recorded(in_place) == recorded(out_of_place)


def view_of_the_result(x):
    h = x * 2
    h.add_(1)
    return h.flatten(1)


def test_a_view_after_the_write():
    assert recorded(view_of_the_result) == recorded(lambda x: (x * 2 + 1).flatten(1))


def test_nothing_is_computed():
    # 12 TB, were they there.
    images = torch.zeros(1).expand(3, 10**6, 10**6)
    assert recorded(out_of_place, images).output == recorded(in_place, images).output


def test_what_calls_give_may_be_known_from_before():
    model, forms = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval(), {}
    with torch.no_grad():
        first, second = (record(model, IMAGES, state_of(model), forms) for _ in range(2))
        other = record(model, IMAGES[:1], state_of(model), forms)
    assert first == second == recorded(model, state=state_of(model))
    assert first != other


def test_parts_of_a_parameter_are_told_apart():
    w = torch.rand(2, 3, 1, 1)
    first, second = (recorded(lambda x, part=part: x * part, state={"w": w}) for part in w)
    assert first != second


def test_a_constant_without_versions_is_looked_at_again():
    def changing(factor):
        def forward(x):
            with torch.inference_mode():
                constant = torch.ones(3, 1, 1)
            y = x + constant
            with torch.inference_mode():
                constant.mul_(factor)
            return y * constant

        return recorded(forward)

    assert changing(2) == changing(2) != changing(3)


def test_constants_are_known_by_value():
    table = torch.arange(8.0)
    assert recorded(lambda x: x + torch.arange(8.0)) == recorded(lambda x: x + table)
    assert recorded(lambda x: x + torch.arange(8.0)) != recorded(lambda x: x + (table + 1))


def test_parameters_are_known_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    copy = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    copy.load_state_dict(model.state_dict())
    assert recorded(model, state=state_of(model)) == recorded(copy, state=state_of(copy))
    swapped = nn.Sequential(model[1], model[0])
    assert recorded(model, state=state_of(model)) != recorded(swapped, state=state_of(model))


def test_channels_last_pooling_changes_its_shape_in_place():
    def pooled(x):
        h = F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1)
        assert h.is_contiguous(memory_format=torch.channels_last)
        return h

    assert recorded(pooled) == recorded(pooled)


# What is not.


def old_value(x):
    h = x * 2
    before = h
    h = h + 1
    return before


def new_value(x):
    h = x * 2
    before = h
    h += 1
    return before


def view_made_before(x):
    h = x * 2
    view = h.flatten(1)
    h.add_(1)
    return view


def copy_made_before(x):
    h = x * 2
    view = h.flatten(1)
    h = h.add(1)
    return view


def written_through_a_view(x):
    h = x * 2
    h[:, 0].add_(1)
    return h


def beside_a_view(x):
    h = x * 2
    h[:, 0].add(1)
    return h


def cast_back(x):
    h = x * 2
    h += torch.ones(8, dtype=torch.float64)
    return h


def promoted(x):
    return x * 2 + torch.ones(8, dtype=torch.float64)


def two_views_one_write(x):
    h = x * 2
    first, second = h[:, 0], h[:, 1]
    first.add_(1)
    return second + first


def the_other_write(x):
    h = x * 2
    first, second = h[:, 0], h[:, 1]
    second.add_(1)
    return second + first


def reseeded(x):
    torch.manual_seed(42)
    return torch.randn_like(x)


def reseeded_constant(x):
    torch.manual_seed(42)
    return x + torch.rand(8)


def drawn_again(x):
    before = torch.get_rng_state()
    first = torch.rand_like(x)
    torch.set_rng_state(before)
    return first, torch.rand_like(x)


DIFFERENT = [
    (old_value, new_value),
    (view_made_before, copy_made_before),
    (written_through_a_view, beside_a_view),
    (cast_back, promoted),
    (two_views_one_write, the_other_write),
    (lambda x: x - x.relu(), lambda x: x.relu() - x),
    (lambda x: x.clamp(0, 1), lambda x: x.clamp(0.0, 1)),
    (lambda x: x * 0.0, lambda x: x * -0.0),
    (lambda x: {"a": x}, lambda x: {"b": x}),
    (lambda x: (x, 1), lambda x: (x, 2)),
    (lambda x: (torch.rand_like(x), torch.randn_like(x)), lambda x: (torch.randn_like(x), torch.rand_like(x))[::-1]),
    (lambda x: x + torch.rand(8) * 0, lambda x: (torch.rand(3), x + torch.rand(8) * 0)[1]),
    (lambda x: x[:, [0, 1, 2]], lambda x: x[:, [0, 2, 1]]),
    (reseeded, torch.randn_like),
    (reseeded_constant, lambda x: x + torch.rand(8)),
    (drawn_again, lambda x: (torch.rand_like(x), torch.rand_like(x))),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs(one, other):
    assert recorded(one) == recorded(one)
    assert recorded(other) == recorded(other)
    assert recorded(one) != recorded(other)


def test_a_dataclass_is_opened():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    assert recorded(lambda x: Output(x + 1)) == recorded(lambda x: Output(x + 1))
    assert recorded(lambda x: Output(x + 1)) != recorded(lambda x: Output(x))


def test_other_memory_under_a_parameters_name():
    model = nn.Linear(8, 8)

    def renormalised(x):
        model.weight.data = model.weight.data / 2
        return model(x)

    state = state_of(model)
    assert recorded(renormalised, state=state) != recorded(model, state=state)


def test_what_calls_give_is_known_apart_for_true_and_one():
    forms, images = {}, torch.zeros(2, 3, dtype=torch.bool)
    for factor, dtype in ((True, torch.bool), (1, torch.int64), (1.0, torch.float32)):
        assert record(lambda x, f=factor: (x * f).dtype, images, {}, forms).output[1] == [dtype]


# How results lie in memory.


class Layouts(TorchDispatchMode):
    """Collects the shapes and strides of all that operators give, but for what batch norm keeps for backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = result[0] if func is torch.ops.aten.native_batch_norm.default else result
        self.seen += [(str(func), *t.shape, *t.stride()) for t in tensors(given)]
        return result


def check_layouts(model, images):
    def layouts(x):
        with Layouts() as layouts:
            model(x)
        return layouts.seen

    with torch.no_grad():
        real = layouts(images.clone())
    seen = []
    recorded(lambda x: seen.extend(layouts(x)), images, state_of(model))
    assert seen == real


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_all_calls_of_a_network_lie_as_recorded(name, layout):
    model = pytest.importorskip("timm").create_model(name).eval().to(memory_format=layout)
    check_layouts(model, torch.rand(2, 3, 64, 64).to(memory_format=layout))


CONVOLUTIONS = [
    (nn.Conv1d, (4, 8, 3), {}),
    (nn.Conv2d, (4, 8, 3), {}),
    (nn.Conv2d, (4, 8, 1), {"bias": False}),
    (nn.Conv2d, (4, 4, 3), {"groups": 4}),
    (nn.Conv2d, (4, 8, 2), {"stride": 2, "dilation": 2}),
    (nn.Conv2d, (4, 1, 5), {}),
    (nn.ConvTranspose2d, (4, 8, 3), {}),
    (nn.Conv3d, (4, 8, 3), {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", ["neither", "images", "weights"])
@pytest.mark.parametrize(("kind", "channels", "options"), CONVOLUTIONS)
def test_convolutions_lie_as_the_device_lays_them(kind, channels, options, last, dtype):
    model = kind(*channels, **options).to(dtype)
    for rows in (1, 2):
        images = torch.ones(rows, 4, *[5] * (model.weight.dim() - 2), dtype=dtype)
        if last == "images":
            images = images.movedim(1, -1).contiguous().movedim(-1, 1)
        if last == "weights":
            model.weight.data = model.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
        check_layouts(model, images)


def test_a_convolution_in_channels_last_is_not_copied_to_channels_last():
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)

    def written(x):
        h = model(x)
        h.contiguous(memory_format=torch.channels_last).add_(1)
        return h

    assert recorded(written, state=state_of(model)) == recorded(lambda x: model(x) + 1, state=state_of(model))


# What cannot be recorded.


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_attention_is_random_for_its_dropout_alone(rate):
    """Whether a graph repeats random numbers takes 38 forwards to see."""
    computed = []

    def forward(self, x):
        computed.append(type(x) is torch.Tensor)
        return F.relu(F.scaled_dot_product_attention(x, x, x, dropout_p=rate))

    assert capture(of(forward), IMAGES).checked == "operations"
    assert any(computed) == (rate > 0)


class Keeping(nn.Module):
    kept = None

    def forward(self, x):
        self.kept = x.new_ones(3) if self.kept is None else self.kept
        return x.sum(-1).sum(-1) + self.kept


def test_what_a_model_keeps_is_not_taken_for_another():
    model = Keeping()
    recorded(model)
    with pytest.raises(NeedsData, match="kept a tensor of an earlier call"):
        recorded(model)
    with pytest.raises(NeedsData, match="without data, which a function kept"):
        model.kept + 1


def test_state_that_changes():
    norm = nn.BatchNorm2d(3)
    with pytest.raises(NeedsData, match="writes into what was there before"):
        recorded(norm, state=state_of(norm))
    with pytest.raises(NeedsData, match="writes into what was there before"):
        recorded(lambda x: norm.weight.data.mul_(2) and x, state=state_of(norm))
    assert torch.equal(norm.weight, torch.ones(3))


def test_constants_that_change():
    def counting(self, x):
        self.count += 1
        return F.relu(x * self.count)

    model = of(counting)
    model.count = torch.zeros(())  # no buffer
    with pytest.raises(CaptureError, match="computes something else"):
        capture(model, IMAGES)
    assert model.count == 0
    assert recorded(lambda x: x + torch.zeros(8).add_(1)) == recorded(lambda x: x + torch.ones(8))


def reassigned(x):
    h = x * 2
    h.data = h * 2
    return h


def test_data_is_read():
    assert recorded(lambda x: (x * 2).data.add_(1)) == recorded(lambda x: (x * 2).detach().add_(1))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.zeros(2, 3, 8, 8).copy_(x), "writes images into a constant"),
        (lambda x: F.conv2d(x, torch.ones(4, 3, 1, 1, dtype=torch.float64)), "tensors of two types"),
        (lambda x: x + torch.ones(8, device="meta"), "tensors of two devices"),
        (reassigned, "assignment to .data"),
        (lambda x: x + torch.rand(8, generator=torch.Generator()), "a generator of its own"),
    ],
)
def test_what_only_real_tensors_can_tell(function, reason):
    with pytest.raises(NeedsData, match=reason):
        recorded(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x * x.max().item(),
        lambda x: torch.tensor(x.tolist()),
    ],
)
def test_values_are_not_to_be_had(function):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError, NeedsData)):
        recorded(function)


# What capture makes of it.


def test_a_graph_is_seen_to_make_the_models_calls():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    assert capture(model, IMAGES).checked == "operations"
    assert capture(model).checked == ""


def test_what_asks_for_values_is_compared_in_numbers():
    def guarded(self, x):
        if x.isnan().any():
            raise ValueError
        return F.relu(x)

    assert capture(of(guarded), IMAGES).checked == "numbers"


def test_results_that_are_not_numbers_are_equal():
    def guarded(self, x):
        if x.isnan().any():
            raise ValueError
        return F.relu(torch.log(x - 2))

    assert capture(of(guarded), IMAGES).checked == "numbers"


def seeding(self, x):
    torch.manual_seed(42)
    return F.relu(x + torch.randn_like(x))


def test_a_result_of_another_type_is_noticed():
    def doubled(self, x):
        if x.isnan().any():
            raise ValueError
        return F.relu(x).double() if type(x) is torch.Tensor else F.relu(x)

    with pytest.raises(CaptureError, match=r"returns .*float32.* where the model returns .*float64"):
        capture(of(doubled), IMAGES)


def test_what_a_trace_drops_is_noticed():
    with pytest.raises(CaptureError, match="computes something else"):
        capture(of(seeding), IMAGES)


def test_models_run_on_nothing_before_numbers_are_needed():
    seen = []

    def watched(self, x):
        seen.append(type(x).__name__)
        return F.relu(x)

    assert capture(of(watched), IMAGES).checked == "operations"
    assert "Tensor" not in seen


def test_a_models_own_error_is_its_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(CaptureError, match=r"itself fails on images .*dtype torch\.float64"):
        capture(model, IMAGES.double())


def test_a_leaf_that_keeps_what_it_is_given_is_left_as_it_was():
    class Leaf(nn.Module):
        kept = None

        def forward(self, x):
            self.kept = x.new_zeros(())
            return x + self.kept if len(str(int(x.shape[0]))) else x  # int() stops a plain trace

    captured = capture(nn.Sequential(Leaf(), nn.ReLU()).eval(), IMAGES)
    assert captured.checked == "operations"
    assert captured.graph_module.get_submodule("0").kept is None
