"""What models return besides one tensor: captured with its type and every tensor in it, exported, and attacked."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import meansparse_fx as msfx
from meansparse_fx.capture import capture
from meansparse_fx.capture.verify import Reference
from meansparse_fx.cli import app
from meansparse_fx.errors import ArtifactError, CaptureError, EvaluationError
from meansparse_fx.export import export, to_exported_program
from meansparse_fx.outputs import difference, flatten, logits_in
from meansparse_fx.passes import returning_logits
from tests.models import Functional

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


class Pair(NamedTuple):
    logits: Any
    features: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    logits: Any
    features: Any = None


@dataclasses.dataclass
class Filled(OrderedDict):
    """As transformers' ModelOutput: a dataclass, and a dict of the fields that are not None."""

    loss: Any = None
    logits: Any = None
    features: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Strange(dict):
    def __init__(self, one, other):
        super().__init__(one=one, other=other)


MAKERS = {
    "OrderedDict": lambda y, h: OrderedDict(out=y, features=h),
    "dict": lambda y, h: {"logits": y, "features": [h, (h, None)], "name": "net"},
    "tuple": lambda y, h: (y, h),
    "list": lambda y, h: [y, h],
    "named tuple": Pair,
    "dataclass": Record,
    "ModelOutput": lambda y, h: Filled(logits=y, features=(h,)),
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.bn, self.act, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4 * 36, 3)

    def forward(self, x):
        h = self.act(self.bn(self.conv(x)))
        y = self.head(h.flatten(1))
        return MAKERS[self.kind](y, h) if self.kind in MAKERS else y


def network(kind):
    torch.manual_seed(0)
    return Net(kind).eval().requires_grad_(False)


def assert_same(actual, expected):
    (leaves, form), (others, other_form) = flatten(actual), flatten(expected)
    assert form == other_form
    assert type(actual) is type(expected)
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", MAKERS)
def test_the_type_stays_through_every_verb(kind):
    model = network(kind)
    expected = model(IMAGES)
    sparse = msfx.transform(model, IMAGES)
    assert_same(sparse(IMAGES), expected)
    stats = msfx.calibrate(sparse, [IMAGES], progress=False)
    msfx.set_alpha(sparse, 0.2)
    rewritten = sparse(IMAGES)
    logits = 0 if kind in ("tuple", "list") else None
    assert not torch.equal(logits_in(rewritten, logits), logits_in(expected, logits))
    assert_same(msfx.restore(sparse)(IMAGES), expected)
    assert_same(copy.deepcopy(sparse)(IMAGES), rewritten)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False)(IMAGES), rewritten)
    torch.compiler.reset()
    options = {"statistics": stats, "alpha": 0.2, "inner": "eager"}
    assert_same(torch.compile(model, backend="meansparse", options=options)(IMAGES), rewritten)


@pytest.mark.parametrize("kind", ["dict", "list", "OrderedDict", "tuple"])
def test_an_exported_program_returns_the_same_containers(kind):
    sparse = msfx.transform(network(kind), IMAGES)
    msfx.calibrate(sparse, [IMAGES], progress=False)
    result = to_exported_program(sparse, IMAGES).module()(IMAGES)
    assert flatten(result)[1] == flatten(sparse(IMAGES))[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exports_name_what_is_returned_or_say_what_to_register(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sparse = {kind: msfx.transform(network(kind), IMAGES) for kind in ("OrderedDict", "dataclass", "named tuple")}
    for each in sparse.values():
        msfx.calibrate(each, [IMAGES], progress=False)
    export(sparse["OrderedDict"], IMAGES, tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["out", "features"]
    with pytest.raises(CaptureError, match=r"torch.export.register_dataclass"):
        to_exported_program(sparse["dataclass"], IMAGES)
    with pytest.raises(ArtifactError, match="cannot write what the model returns"):
        export(sparse["named tuple"], IMAGES, tmp_path / "model.pt2")


def test_only_nan_equals_nan_and_only_inf_equals_inf():
    values = torch.tensor([torch.nan, torch.inf, 1])
    assert difference(values, values.clone()) == ""
    for other in ([0, torch.inf, 1], [torch.nan, torch.finfo().max, 1], [torch.nan, -torch.inf, 1]):
        assert difference(values, torch.tensor(other)) == "computes something else than the model"


@pytest.mark.parametrize("kind", ["dataclass", "ModelOutput"])
def test_every_tensor_of_the_output_is_compared(kind):
    """Features that differ, or their gradient alone, are another model."""

    def of(change):
        def forward(self, x):
            h = self.act(self.conv(x))
            return MAKERS[kind](h.mean((2, 3)), change(h))

        torch.manual_seed(0)
        return Functional(forward, conv=nn.Conv2d(3, 4, 3), act=nn.ReLU()).eval()

    plain = Reference.of(of(lambda h: h), IMAGES)
    plain.check(capture(of(lambda h: h)).graph_module)
    with pytest.raises(CaptureError, match="computes something else"):
        plain.check(capture(of(lambda h: h + 1)).graph_module)
    with pytest.raises(CaptureError, match="not its gradients"):
        plain.check(capture(of(lambda h: h.detach())).graph_module)
    with pytest.raises(CaptureError, match=r"returns NoneType where the model returns torch.float32 \[2, 4, 6, 6\]"):
        plain.check(capture(of(lambda h: None)).graph_module)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda y, h: defaultdict(list, a=y), "defaultdict"),
        (Strange, "Strange"),
        (lambda y, h: iter([y]), "iterator"),
    ],
)
def test_what_no_graph_can_return_is_named(make, kind):
    model = Functional(lambda self, x: make(self.act(x), x), act=nn.ReLU()).eval()
    with pytest.raises(CaptureError, match=f"{kind}.*; return tensors in tuples, lists, dicts"):
        msfx.transform(model, IMAGES)


def test_where_the_logits_are():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert logits_in(a) is a
    assert logits_in({"features": a, "logits": b}) is b
    assert logits_in(OrderedDict(out=a, aux=b)) is a
    assert logits_in((None, [a], b)) is b  # the only tensor
    assert logits_in((a, b), 1) is b
    assert logits_in(Filled(logits=a, features=b), 1) is b  # by position what is there
    assert logits_in(Pair(a, b), "features") is b
    assert logits_in({"x": {"y": b}}, lambda output: output["x"]["y"]) is b
    with pytest.raises(EvaluationError, match=r"dict of a, b: say which .* logits=NAME"):
        logits_in({"a": a, "b": b, "c": None})
    with pytest.raises(EvaluationError, match=r"dict of a, b, and logits='c' is no tensor"):
        logits_in({"a": a, "b": b}, "c")


ATTACKS: dict = {
    "attacks": ("apgd-ce/exact", "apgd-margin/annealed", "adaptive-1-1", "square", "apgd-start/annealed"),
    **{"eps": 0.05, "steps": 2, "queries": 10, "sanity_images": 6, "progress": False},
}


@pytest.mark.parametrize("fuse", ["activation", "all"])
@pytest.mark.parametrize(("kind", "logits"), [("OrderedDict", None), ("ModelOutput", "logits"), ("tuple", 0)])
def test_attacks_meet_the_logits_alone(kind, logits, fuse, tmp_path):
    """All attacks and checks find what they find in a model that returns nothing else."""
    found, searched = [], []
    for other, where in ((kind, logits), ("", None)):
        sparse = msfx.transform(network(other), IMAGES, fuse=fuse)
        msfx.calibrate(sparse, [IMAGES.flip(-1)], progress=False)  # others than those attacked
        msfx.set_alpha(sparse, 0.3)
        file = tmp_path / f"{other}.safetensors"
        result = msfx.evaluate(sparse, (IMAGES, LABELS), logits=where, save_adversarial=file, **ATTACKS)
        assert any(check.name.startswith("planted") for check in result.checks)
        found.append({k: v for k, v in result.to_dict().items() if k != "seconds"})
        assert msfx.verify(file, sparse, logits=where).holds
        search = msfx.select_alpha(sparse, (1 - IMAGES, LABELS), alphas=(0.3,), steps=2, logits=where, progress=False)
        searched.append(search.to_dict())
    assert found[0] == found[1]
    assert searched[0] == searched[1]


def test_a_model_that_returns_its_logits_is_attacked_as_it_is():
    """So that its forward hooks stay allowed."""
    model = network("")
    model.register_forward_hook(lambda module, args, output: None)
    sparse = msfx.transform(model, IMAGES)
    assert returning_logits(sparse) is sparse
    with pytest.raises(EvaluationError, match="forward hooks"):
        returning_logits(sparse, lambda output: output[:, 1:])
    doubled = returning_logits(msfx.transform(network(""), IMAGES), lambda output: 2 * output)
    assert torch.equal(doubled(IMAGES), 2 * network("")(IMAGES))


def test_without_a_name_the_keys_are_said():
    sparse = msfx.transform(network("tuple"), IMAGES)
    with pytest.raises(EvaluationError, match="tuple of 0, 1: say which of them are the logits"):
        msfx.evaluate(sparse, (IMAGES, LABELS), progress=False)


def test_forward_hooks_see_all_so_logits_cannot_be_taken_behind_them():
    model = network("tuple")
    model.register_forward_hook(lambda module, args, output: None)
    sparse = msfx.transform(model, IMAGES)
    with pytest.raises(EvaluationError, match="forward hooks"):
        msfx.evaluate(sparse, (IMAGES, LABELS), logits=0, progress=False)


SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()), nn.Linear(144, 3)

    def forward(self, x):
        features = self.body(x)
        return {"features": features, "scores": self.head(features)}
"""


def test_the_command_line_takes_the_name(tmp_path):
    import numpy as np

    (tmp_path / "net_of_outputs.py").write_text(SOURCE)
    random = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", images=random.integers(0, 256, (9, 8, 8), np.uint8), labels=random.integers(0, 3, 9))
    model = [f"{tmp_path}/net_of_outputs.py:Net", "--data", f"{tmp_path}/d.npz"]
    statistics = ["--statistics", f"{tmp_path}/s.safetensors"]
    quick = ["--steps", "1", "--eps", "0.1", "--attacks", "apgd-ce/exact"]
    runner = CliRunner()
    calibrate = ["calibrate", *model, "--limit", "3", "--out", f"{tmp_path}/s.safetensors"]
    assert runner.invoke(app, calibrate).exit_code == 0
    model += ["--skip", "3"]  # others than those
    for command in (["select"], ["evaluate", "--alpha", "0.1"]):
        done = runner.invoke(app, [command[0], *model, *statistics, *quick, *command[1:]])
        assert "dict of features, scores: say which" in done.output.replace("\n", " ")
        done = runner.invoke(app, [command[0], *model, *statistics, *quick, *command[1:], "--logits", "scores"])
        assert done.exit_code == 0, done.output
