"""Capture: the graph computes what the model computes, shows every activation, and leaves the model alone."""

import copy
import operator
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from meansparse_fx.capture import capture
from meansparse_fx.capture.counting import count_activations
from meansparse_fx.capture.guards import expect_size
from meansparse_fx.errors import CaptureError, StateError
from tests.models import Functional

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
SYMBOLIC = "symbolic trace"
BY_EXAMPLE = "symbolic trace at the example's image size"


class Plain(nn.Module):
    """A model with what a graph does not use: a spare layer, a buffer that state_dict leaves out."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.spare = nn.ModuleDict({"head": nn.Linear(4, 2)})
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("shift", torch.ones(4, 1, 1))
        self.register_buffer("passing", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.act(self.conv(x) * self.gain + self.shift * 2)


def of(function, **children):
    return Functional(function, **children).eval()


def targets(graph_module):
    return [n.target for n in graph_module.graph.nodes if n.op == "call_module"]


def test_the_graph_keeps_state_types_and_class_name():
    model = Plain().eval()
    captured = capture(model, IMAGES)
    graph_module = captured.graph_module
    assert captured.route == SYMBOLIC
    assert isinstance(graph_module, fx.GraphModule)
    assert type(graph_module).__name__ == "Plain"
    assert graph_module.state_dict().keys() == model.state_dict().keys()
    assert isinstance(graph_module.spare, nn.ModuleDict)
    assert dict(graph_module.named_buffers()).keys() == {"shift", "passing"}
    assert not graph_module.gain.requires_grad
    assert graph_module.conv.weight.requires_grad
    assert not graph_module.training
    assert torch.equal(graph_module(IMAGES), model(IMAGES))


def test_the_graph_has_its_own_parameters_and_reads_its_own_state():
    model = Plain().eval()
    graph_module = capture(model, IMAGES).graph_module
    before = model(IMAGES).clone()
    with torch.no_grad():
        graph_module.conv.weight.zero_()
        graph_module.load_state_dict({"shift": torch.full((4, 1, 1), 7.0)}, strict=False)
        graph_module.conv.bias.zero_()
    assert torch.equal(model(IMAGES), before)
    assert torch.equal(graph_module(IMAGES), torch.full_like(before, 14.0))


def test_the_model_is_left_as_it_was():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = {}
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            if "bias" not in self.cache:
                self.cache["bias"] = x.new_ones(())
            return F.relu(x - self.cache["bias"])

    model = Caching().eval()
    before = torch.random.get_rng_state()
    graph_module = capture(model, IMAGES).graph_module
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.cache == {}
    assert model.calls == 0
    assert graph_module.calls == 0


def test_a_model_that_renormalises_its_weights_is_refused_and_left_as_it_was():
    class Renormalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            self.head.weight.data = F.normalize(self.head.weight, dim=1)
            return self.head(F.relu(x))

    model = Renormalising().eval()
    before = model.head.weight.detach().clone()
    with pytest.raises(CaptureError, match=r"head\.weight\.data = .*give weights their values beforehand"):
        capture(model, IMAGES)
    assert torch.equal(model.head.weight, before)


def test_it_can_be_copied_and_pickled():
    graph_module = capture(Plain().eval(), IMAGES).graph_module
    expected = graph_module(IMAGES)
    for clone in (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        if torch.__version__ >= (2, 14):  # before, torch's copies forget which buffers are not persistent
            assert clone.state_dict().keys() == graph_module.state_dict().keys()
        assert torch.equal(clone(IMAGES), expected)


def test_train_mode_is_refused():
    model = Plain()
    with pytest.raises(StateError, match=r"train mode \(the model itself and 4 more\).*model\.eval\(\)"):
        capture(model, IMAGES)
    model.eval().act.train()
    with pytest.raises(StateError, match=r"train mode \(act\)"):
        capture(model, IMAGES)


def test_what_a_models_own_eval_leaves_in_train_mode_is_no_obstacle():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            self.training = self[0].training = mode
            return self

    model = Stubborn(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(StateError, match=r"train mode \(the model itself and 1 more\)"):
        capture(model, IMAGES)
    assert capture(model.eval(), IMAGES).route == SYMBOLIC


def test_a_transformed_model_is_refused():
    model = nn.Sequential(Plain()).eval()
    model[0].add_module("meansparse", nn.Module().eval())
    with pytest.raises(StateError, match=r"already transformed .*0\.meansparse"):
        capture(model, IMAGES)


def test_data_parallel_is_unwrapped():
    model = Plain().eval()
    assert capture(nn.DataParallel(model).eval(), IMAGES).graph_module.state_dict().keys() == model.state_dict().keys()


def test_without_images_the_route_says_unverified():
    assert capture(Plain().eval()).route == f"{SYMBOLIC}, unverified"


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_number_of_example_images_serves(rows):
    assert capture(Plain().eval(), IMAGES[:1].repeat(rows, 1, 1, 1)).route == SYMBOLIC


def test_an_empty_batch_is_refused():
    with pytest.raises(CaptureError, match="empty batch"):
        capture(Plain().eval(), IMAGES[:0])


def test_a_model_that_fails_by_itself_is_named_as_such():
    with pytest.raises(CaptureError, match=r"Plain itself fails on images of shape \[2, 8, 8, 3\]"):
        capture(Plain().eval(), IMAGES.permute(0, 2, 3, 1))


def test_optional_arguments_keep_their_defaults():
    class Masked(nn.Module):
        def forward(self, x, mask=None, *, scale=2.0):
            return F.relu(x * scale if mask is None else x * mask)

    graph_module = capture(Masked().eval(), IMAGES).graph_module
    assert [n.name for n in graph_module.graph.nodes if n.op == "placeholder"] == ["x"]
    assert torch.equal(graph_module(IMAGES), F.relu(IMAGES * 2))


def test_a_second_required_argument_is_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(CaptureError, match="needs the arguments x, y"):
        capture(Two().eval())


def test_hooks_of_the_model_itself_run():
    model = Plain().eval()
    model.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(capture(model, IMAGES).graph_module(IMAGES), model(IMAGES))


class Padded(nn.Module):
    """Control flow on the input's values, and no activation: a leaf."""

    def forward(self, x):
        return F.pad(x, (1, 1, 1, 1)) if x.max() < 4 else x


def test_control_flow_without_activations_becomes_a_leaf():
    model = nn.Sequential(Padded(), nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    captured = capture(model, IMAGES)
    assert targets(captured.graph_module) == ["0", "1", "2"]
    assert type(captured.graph_module.get_submodule("0")) is Padded


def test_control_flow_in_the_model_names_the_line_and_a_way_out():
    def branch(self, x):
        if x.sum() > 0:
            return self.act(x)
        return x

    with pytest.raises(CaptureError) as caught:
        capture(of(branch, act=nn.ReLU()), IMAGES)
    message = str(caught.value)
    line = branch.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}, `if x.sum() > 0:`" in message
    assert 'torch.compile(model, backend="meansparse")' in message
    assert message.count("symbolic trace stopped") == 1


def test_a_route_that_fails_when_it_is_checked_prints_nothing(capsys):
    def asking(self, x):
        try:
            return F.gelu(x.images)
        except AttributeError:
            return F.relu(x)

    assert capture(of(asking), IMAGES).route == "symbolic trace at the example's image size"
    assert capsys.readouterr().err == ""


def test_a_module_that_holds_an_activation_is_never_a_leaf():
    class Holding(Padded):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    with pytest.raises(CaptureError, match=r"stopped in 0 \(Holding\)"):
        capture(nn.Sequential(Holding()).eval(), IMAGES)


def test_functions_hidden_in_a_leaf_are_counted():
    class Hiding(Padded):
        def forward(self, x):
            return F.relu(F.relu(super().forward(x)))

    with pytest.raises(CaptureError, match="calls 3 activations and the graph shows 1: 2 are hidden") as caught:
        capture(nn.Sequential(Hiding(), nn.GELU()).eval(), IMAGES)
    assert "stopped in 0 (Hiding)" in str(caught.value)
    assert "if x.max() < 4" in str(caught.value)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_are_traced_through(norm_first):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, activation="gelu").eval()
    graph_module = capture(model, IMAGES[:, 0]).graph_module
    assert count_activations(graph_module) == 1


def test_a_transformer_is_traced_through():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    assert count_activations(capture(model, IMAGES[:, 0]).graph_module) == 2


def test_a_graph_that_computes_something_else_is_refused():
    def counting(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return F.relu(x * self.calls)

    with pytest.raises(CaptureError, match="computes something else than the model on a batch of 3"):
        capture(of(counting), IMAGES)


def test_statements_without_readers_stay():
    def muted(self, x):
        h = F.relu(x)
        h.mul_(0.5)
        return h

    assert torch.equal(capture(of(muted), IMAGES).graph_module(IMAGES), F.relu(IMAGES) * 0.5)


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
def test_names_that_a_graph_module_needs_are_refused(name):
    model = nn.Sequential()
    model.add_module(name, nn.ReLU())
    with pytest.raises(CaptureError, match=f"'{name}' has a name that fx.GraphModule needs"):
        capture(model.eval(), IMAGES)


def test_branches_on_buffers_are_answered_by_the_example():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.register_buffer("on", torch.tensor(True))

        def forward(self, x):
            return self.act(x) if self.on else x

    captured = capture(Switched().eval(), IMAGES)
    assert captured.route == BY_EXAMPLE
    assert captured.graph_module.state_dict().keys() == {"on"}


def test_plain_tensor_attributes_stay_out_of_the_state():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.full((3, 1, 1), 0.5)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x - self.mean)

    for model in (Normalised().eval(), nn.Sequential(Normalised()).eval()):
        graph_module = capture(model, IMAGES).graph_module
        assert graph_module.state_dict().keys() == set()
        assert torch.equal(graph_module.double()(IMAGES.double()), F.relu(IMAGES.double() - 0.5))


def test_nested_outputs_are_compared():
    def nested(self, x):
        return {"logits": F.relu(x), "features": [x.flatten(1), (x / 0 - x / 0, 3)]}

    output = capture(of(nested), IMAGES).graph_module(IMAGES)
    assert torch.equal(output["logits"], F.relu(IMAGES))


def test_noise_in_the_model_is_no_difference():
    def noisy(self, x):
        return F.relu(x + torch.randn_like(x))

    assert capture(of(noisy), IMAGES).route == SYMBOLIC


def test_a_module_under_two_names_has_the_first():
    act = nn.ReLU()
    model = nn.Sequential(act, nn.Conv2d(3, 3, 1), act).eval()
    assert targets(capture(model, IMAGES).graph_module) == ["0", "1", "0"]


def test_tracing_a_thousand_nodes_is_linear_in_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return F.relu(x * self.scale)

    model = nn.Sequential(*(Scaled() for _ in range(330))).eval()
    reads = 0
    named_parameters = model.named_parameters

    def counting(*args, **kwargs):
        nonlocal reads
        reads += 1
        return named_parameters(*args, **kwargs)

    object.__setattr__(model, "named_parameters", counting)
    graph_module = capture(model).graph_module
    assert len(graph_module.graph.nodes) == 330 * 3 + 2
    assert reads < 10


# What cannot be captured, and what was compiled.


def scripted(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.script(function)


def script_traced(model, *images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, *images)


class Normalising(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / 0.2


def inside(module):
    return nn.Sequential(*nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()).eval(), module)


SCRIPT = r"TorchScript, which hides its activations \({}\): pass the nn.Module that it was made from"
ATEN = r"graph of aten operators, as torch.export makes it"
REFUSED = {
    "a scripted model": (lambda: scripted(Plain().eval()), r"the model \(.*" + SCRIPT.format("relu")),
    "a scripted part": (lambda: inside(scripted(nn.GELU().eval())), r"2 \(.*" + SCRIPT.format("gelu")),
    "a traced part": (lambda: inside(script_traced(nn.SiLU(), IMAGES)), r"2 \(.*" + SCRIPT.format("silu")),
    "a frozen model": (
        lambda: torch.jit.freeze(script_traced(inside(nn.Hardswish()).eval(), IMAGES)),
        r"the model \(.*" + SCRIPT.format("relu"),
    ),
    "a Swish in TorchScript": (
        lambda: inside(script_traced(Functional(lambda m, x: x * torch.sigmoid(x)), IMAGES)),
        SCRIPT.format("sigmoid"),
    ),
    "an exported program": (
        lambda: torch.export.export(inside(nn.ReLU()), (IMAGES,)),
        "ExportedProgram is no torch.nn.Module: pass the nn.Module that it was made from",
    ),
    "its module": (lambda: torch.export.export(inside(nn.ReLU()), (IMAGES,)).module(), ATEN),
    "its module as a part": (lambda: inside(torch.export.export(nn.ReLU(), (IMAGES,)).module()), rf"2 \(.* {ATEN}"),
    "not initialised": (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3), nn.ReLU()).eval(),
        r"1 \(LazyLinear\) is not initialised yet: call the model once",
    ),
    "quantised": (lambda: inside(torch.ao.nn.quantized.ReLU6()), r"2 \(ReLU6\) is quantised.*before quantising it"),
}


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning", "ignore:.*deprecated.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_made_of_python_is_refused(name):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(CaptureError, match=message):
        capture(model, IMAGES)


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning", "ignore:.*deprecated.*:DeprecationWarning")
def test_what_is_to_be_quantised_is_none_yet():
    """torchvision's quantizable models add by a FloatFunctional, which was refused as quantised."""
    adding = Functional(lambda self, x: self.add.add_relu(x, x), add=torch.ao.nn.quantized.FloatFunctional()).eval()
    graph_module = capture(adding, IMAGES).graph_module
    assert torch.equal(graph_module(IMAGES), F.relu(2 * IMAGES))
    assert count_activations(graph_module) == 1


def test_torchscript_without_activations_is_called_as_it_is():
    model = nn.Sequential(scripted(Normalising().eval()), Plain()).eval()
    graph_module = capture(model, IMAGES).graph_module
    assert torch.equal(graph_module(IMAGES), model(IMAGES))
    assert targets(graph_module)[0] == "0"
    own, before = graph_module.get_submodule("0").mean, model[0].mean
    assert own.requires_grad
    assert own.is_leaf
    assert own.data_ptr() != before.data_ptr()


def test_compiled_functions_are_traced_as_python():
    @torch.compile(backend="eager")
    def compiled(x):
        return F.silu(x) * 2

    script = scripted(_swish)
    for function, expected in (
        (compiled, [F.silu, operator.mul]),
        (script, [torch.sigmoid, operator.mul]),
        (lambda x: compiled(script(x)), [torch.sigmoid, operator.mul, F.silu, operator.mul]),
    ):
        model = Functional(lambda m, x, f=function: f(x), kept=nn.Identity())
        model.kept.function = script  # which cannot be pickled
        for asked in (model, Functional(lambda m, x, f=function: f(x) if len(x.shape) == 4 else x)):
            graph = capture(asked.eval(), IMAGES).graph_module.graph
            functions = [n.target for n in graph.nodes if n.op == "call_function"]
            assert [f for f in functions if f is not expect_size] == expected


def _swish(x):
    return x * torch.sigmoid(x)


def test_models_without_data():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to("meta").eval()
    assert capture(model, IMAGES.to("meta")).graph_module(IMAGES.to("meta")).shape == (2, 4, 6, 6)


def drawing(draw):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return draw(F.relu(self.conv(x)))

    return Drawing().eval()


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x if random.random() < 0.5 else -x,
        lambda x: x * float(np.random.uniform(1, 2)),  # noqa: NPY002
        lambda x: F.pad(x, (random.randint(0, 3), 0)),
    ],
)
def test_random_numbers_of_python_and_numpy_are_refused(draw):
    with pytest.raises(CaptureError, match="random numbers of Python or NumPy"):
        capture(drawing(draw), torch.rand(2, 3, 8, 8))


def test_numbers_that_are_drawn_and_not_used_are_no_matter():
    def draw(x):
        random.random(), np.random.uniform()  # noqa: NPY002
        return x

    random.seed(0), np.random.seed(0)  # noqa: NPY002
    graph_module = capture(drawing(draw), images := torch.rand(2, 3, 8, 8)).graph_module
    after = random.random(), np.random.uniform()  # noqa: NPY002
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    assert after == (random.random(), np.random.uniform())  # noqa: NPY002
    assert graph_module(images).min() == 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x if torch.rand(()).item() < 0.5 else -x,
        lambda x: x * int(torch.randint(1, 4, ())),
        lambda x: F.pad(x, (int(torch.randint(0, 3, ())), 0)),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_what_torchs_random_numbers_decide_in_python_is_refused(draw, seed):
    torch.manual_seed(seed)  # in some the trace draws what the checks draw first
    with pytest.raises(CaptureError, match=r"(constant|constants) of (torch's )?random numbers"):
        capture(drawing(draw), torch.rand(2, 3, 8, 8))


def test_random_numbers_that_the_graph_draws_itself_are_the_models():
    model = drawing(lambda x: x + torch.rand_like(x))
    graph_module = capture(model, images := torch.rand(2, 3, 8, 8)).graph_module
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(images)
        torch.manual_seed(seed)
        assert torch.equal(graph_module(images), expected)


def test_what_forward_keeps_out_of_sight_is_named():
    kept = []

    def keep(x):
        kept.append(0)
        return x * len(kept)

    with pytest.raises(CaptureError, match="Run again on the same images it returns something else"):
        capture(drawing(keep), torch.rand(2, 3, 8, 8))


def test_a_constant_is_expanded_to_the_batch():
    def positions(self, x):
        steps = torch.arange(8.0)
        return (
            F.relu(x + steps.expand(x.shape[0], 3, 8, -1))
            + steps.expand((x.shape[0], 3, 8, 8))
            + steps[:, None].expand(8, 8)
        )

    model = of(positions)
    captured = capture(model, IMAGES)
    assert captured.route == SYMBOLIC
    for graph_module in (captured.graph_module, pickle.loads(pickle.dumps(captured.graph_module))):
        assert torch.equal(graph_module(IMAGES), model(IMAGES))
