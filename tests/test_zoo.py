"""load_model: every way to name a model, and an error that helps for every way to get it wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from meansparse_fx.errors import ArtifactError, MeanSparseError, ModelError
from meansparse_fx.zoo import Normalised, input_shape, load_model

SOURCE = """
from torch import nn
from tiny_neighbour import WIDTH

def net():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Flatten(), nn.Linear(WIDTH * 36, 5))

def words():
    return "no model"
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tiny_neighbour.py").write_text("WIDTH = 4\n")
    path = tmp_path / "tiny.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def spec(file):
    return f"{file}:net"


def test_function_of_a_file(spec):
    model = load_model(spec)
    assert not model.training
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(("name", "classes"), [("timm:resnet18", 7), ("torchvision:resnet18", 7)])
def test_libraries(name, classes):
    pytest.importorskip(name.split(":")[0])
    model = load_model(name, num_classes=classes)
    assert not model.training
    assert model.fc.out_features == classes


def test_bundled():
    assert load_model("bundled")(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_input_shape():
    timm = pytest.importorskip("timm")
    assert input_shape(load_model("bundled")) == (1, 28, 28)
    assert input_shape(timm.create_model("vit_tiny_patch16_384")) == (3, 384, 384)
    assert input_shape(nn.Linear(2, 2)) == (3, 224, 224)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("timm:resnet81", "timm has no model 'resnet81'; close: resnet"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; close: resnet"),
        ("torchvision:fcn_resnet50", "torchvision has no model"),  # not a classifier
        ("timm:qqqqqqqqqq", "list_models"),
        ("resnet18", "names no model; expected timm:NAME"),
        ("keras:resnet18", "names no model"),
        ("nowhere.py:net", "nowhere.py: no such file"),
    ],
)
def test_unknown_models(spec, problem):
    with pytest.raises(ModelError, match=problem):
        load_model(spec)


def test_functions_that_make_no_model(file):
    with pytest.raises(ModelError, match="has no function 'nett'; it has net, words"):
        load_model(f"{file}:nett")
    with pytest.raises(ModelError, match=r"returned str, not a torch\.nn\.Module"):
        load_model(f"{file}:words")


def test_classes_are_for_libraries(spec):
    with pytest.raises(ModelError, match="timm and torchvision models only"):
        load_model(spec, num_classes=3)


@pytest.fixture
def state(spec):
    torch.manual_seed(1)
    return load_model(spec).state_dict()


def check_loaded(spec, path, state):
    loaded = load_model(spec, path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}], ids=["bare", "checkpoint"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights(tmp_path, spec, state, wrap, prefix):
    torch.save(wrap({prefix + name: value for name, value in state.items()}), tmp_path / "a.pt")
    check_loaded(spec, tmp_path / "a.pt", state)


def test_safetensors(tmp_path, spec, state):
    save_file(state, tmp_path / "a.safetensors")
    check_loaded(spec, tmp_path / "a.safetensors", state)


def test_weights_of_another_model(tmp_path, spec, state):
    changed = {"other": torch.zeros(1)} | {k: v for k, v in state.items() if k != "0.bias"}
    changed["3.bias"] = torch.zeros(6)
    torch.save(changed, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"1 missing: 0\.bias; 1 unexpected: other; 1 of another shape: 3\.bias \[6\]"):
        load_model(spec, tmp_path / "a.pt")


class Custom:
    """Needs unpickling."""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_weights(tmp_path, spec, state, suffix, keep):
    path = tmp_path / f"a{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="truncated"):
        load_model(spec, path)


def test_files_that_hold_no_weights(tmp_path, spec):
    with pytest.raises(ArtifactError, match="no such file"):
        load_model(spec, tmp_path / "none.pt")
    torch.save({"lr": 0.1}, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="not a state_dict"):
        load_model(spec, tmp_path / "a.pt")


def test_weights_are_never_unpickled(tmp_path, spec):
    torch.save(Custom(), tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match="unpickling"):
        load_model(spec, tmp_path / "a.pt")


def test_normalised():
    inner = nn.Conv2d(3, 2, 1).eval()
    outer = Normalised(inner, (0.1, 0.2, 0.3), (0.5, 0.5, 0.25))
    x = torch.rand(2, 3, 4, 4)
    by_hand = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.2) / 0.5, (x[:, 2] - 0.3) / 0.25], 1)
    torch.testing.assert_close(outer(x), inner(by_hand))


def test_errors_are_of_the_packages_family():
    assert issubclass(ModelError, MeanSparseError)
