"""load_model: every way to name a model, and an error that helps for every way to get it wrong."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gdown
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import meansparse_fx as msfx
from benchmarks import zoo as table
from benchmarks.harness import Row, read, write
from benchmarks.page.__main__ import zoo_page
from benchmarks.page.results import Results
from benchmarks.zoo import MODELS, build
from meansparse_fx.errors import ArtifactError, MeanSparseError, ModelError
from meansparse_fx.zoo import Normalised, input_shape, load_model, robustbench_compat
from meansparse_fx.zoo import robustbench as robustbench_zoo

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


def renamed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


WRONG = {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
OPTIMIZER = {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
CHECKPOINTS = {
    "compiled": lambda s: renamed(s, "_orig_mod."),
    "compiled and parallel": lambda s: renamed(s, "_orig_mod.module."),
    "net": lambda s: renamed(s, "net."),
    "Lightning": lambda s: {"state_dict": renamed(s, "model.") | {"loss.weight": torch.zeros(3)}, "epoch": 3},
    "inner wrappers": lambda s: {f"{n.split('.')[0]}.module.{n.split('.')[1]}": v for n, v in s.items()},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": OPTIMIZER, "loss": 0.5},
    "model and optimizer": lambda s: {"model": renamed(s, "module."), "optimizer": OPTIMIZER, "epoch": 3},
    "averaged": lambda s: {"n_averaged": torch.tensor(5)} | renamed(s, "module."),
    "deep": lambda s: {"ema": {"model": {"state_dict": s}}},
    "one of two fits": lambda s: {"state_dict": s, "teacher": WRONG},
    "the same twice": lambda s: {"state_dict": s, "ema": {n: v.clone() for n, v in s.items()}},
    "part of a larger model": lambda s: renamed(s, "backbone.") | renamed(WRONG, "head."),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_that_hold_the_weights(tmp_path, spec, state, kind):
    torch.save(CHECKPOINTS[kind](state), tmp_path / "a.pt")
    check_loaded(spec, tmp_path / "a.pt", state)


@pytest.mark.parametrize("prefix", ["", "student."])
@pytest.mark.parametrize("change", [lambda value: value + 1, lambda value: value.double()])
def test_several_different_weights_are_listed(tmp_path, spec, state, prefix, change):
    other = {name: change(value) for name, value in state.items()}
    held = renamed(state, prefix) | renamed(other, "teacher.") if prefix else {"state_dict": state, "ema": other}
    torch.save(held, tmp_path / "a.pt")
    names = "'student.', 'teacher.'" if prefix else "'ema', 'state_dict'"
    with pytest.raises(ModelError, match=rf"2 different weights of the model, under {names}"):
        load_model(spec, tmp_path / "a.pt")


def test_checkpoints_without_the_weights_list_what_they_hold(tmp_path, spec):
    torch.save({"generator": WRONG, "critic": {"a.weight": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"another model \(it holds 'critic', 'generator'\)"):
        load_model(spec, tmp_path / "a.pt")
    torch.save({"epoch": 3, "optimizer": OPTIMIZER}, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match=r"not a state_dict, .*it holds 'epoch', 'optimizer'"):
        load_model(spec, tmp_path / "a.pt")


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


# RobustBench.

WRN = "corruptions/cifar10/Hendrycks2020AugMix_WRN"


def random_state(model):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def check_filled(model, state, prefix=""):
    own = model.state_dict()
    assert {name.removeprefix(prefix) for name in own} >= state.keys()
    assert all(torch.equal(own[prefix + name], value) for name, value in state.items())
    assert not any(module.training for module in model.modules())


def test_robustbench_lists_its_models():
    names = robustbench_zoo.entries()
    assert len(names) == len(set(names)) == 206  # robustbench 1.1.1
    assert {name.split("/")[0] for name in names} == {"Linf", "L2", "corruptions"}


def test_robustbench_architectures():
    model = robustbench_zoo.architecture(WRN)
    assert not model.training
    assert input_shape(model) == (3, 32, 32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert input_shape(robustbench_zoo.architecture("corruptions/imagenet/AlexNet")) == (3, 224, 224)


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["pt", "safetensors"])
def test_robustbench_weights_of_the_model_itself(tmp_path, save):
    state = random_state(robustbench_zoo.architecture(WRN))
    path = tmp_path / ("a.pt" if save is torch.save else "a.safetensors")
    save(state, path)
    check_filled(load_model(f"robustbench:{WRN}", path), state)


# Forms in which RobustBench's files come: its name, what the file has before each name, what is around it.
FORMS = {
    "DataParallel": (WRN, "module.", "state_dict"),
    "wrapped": (WRN, "module.model.", "state_dict"),
    "bare": (WRN, "model.", None),
    "last": ("Linf/cifar10/Andriushchenko2020Understanding", "", "last"),
    "imagenet": ("Linf/imagenet/Salman2020Do_R18", "module.model.", "state_dict"),
    "timm": ("Linf/cifar10/Debenedetti2022Light_XCiT-S12", "", "state_dict"),
}


@pytest.mark.parametrize("form", FORMS)
def test_robustbench_weights_as_published(tmp_path, form):
    """The normalisation's constants are in the model and not in the files."""
    name, prefix, key = FORMS[form]
    model = robustbench_zoo.architecture(name)
    inner = model.model if isinstance(model, nn.Sequential) else model
    state = {n: v for n, v in random_state(inner).items() if n not in ("mu", "sigma")}
    saved = {prefix + n: v for n, v in state.items()}
    torch.save({key: saved, "epoch": 3} if key else saved, tmp_path / "a.pt")
    loaded = robustbench_zoo.load(name, tmp_path / "a.pt")
    check_filled(loaded, state, "model." if inner is not model else "")
    constants = {n: v for n, v in model.state_dict().items() if n.split(".")[-1] in ("mu", "sigma", "mean", "std")}
    assert all(torch.equal(loaded.state_dict()[n], v) for n, v in constants.items())
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


@pytest.mark.slow
def test_robustbench_ensembles(tmp_path):
    name = "Linf/cifar10/Chen2020Adversarial"
    model = robustbench_zoo.architecture(name)
    states = [random_state(part) for part in model.models]
    for i, state in enumerate(states):
        torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}}, tmp_path / f"x{i}")
        (tmp_path / f"x{i}").rename(tmp_path / f"Chen2020Adversarial.pt_m{i}.pt")
    loaded = robustbench_zoo.load(name, tmp_path)
    for part, state in zip(loaded.models, states, strict=True):
        check_filled(part, state)
    with pytest.raises(ModelError, match="has 3 files: give the directory"):
        robustbench_zoo.load(name, tmp_path / "Chen2020Adversarial.pt_m0.pt")
    (tmp_path / "Chen2020Adversarial.pt_m1.pt").unlink()
    with pytest.raises(ModelError, match=r"lacks Chen2020Adversarial\.pt_m1\.pt"):
        robustbench_zoo.load(name, tmp_path)


def test_robustbench_weights_of_another_model(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt: weights of another model than robustbench:corruptions.*Missing key"):
        load_model(f"robustbench:{WRN}", tmp_path / "a.pt")


def test_robustbench_weights_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch.load itself would
    torch.save({"state_dict": Custom()}, tmp_path / "a.pt")
    for name in (WRN, FORMS["timm"][0]):
        with pytest.raises(ArtifactError, match="unpickling"):
            load_model(f"robustbench:{name}", tmp_path / "a.pt")


def no_network(*args, **kwargs):
    raise ConnectionError("no network\nin a test")


def test_robustbench_without_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gdown, "download", no_network)
    place = tmp_path / "models" / "cifar10" / "corruptions" / "Hendrycks2020AugMix_WRN.pt"
    message = rf"cannot fetch https://drive\.google\.com/uc\?id=\S+ to {place} \(ConnectionError: no network.*--weights"
    with pytest.raises(ModelError, match=message):
        load_model(f"robustbench:{WRN}")
    monkeypatch.setattr(gdown, "download", lambda **_: None)
    with pytest.raises(ModelError, match="nothing came"):
        load_model(f"robustbench:{WRN}")
    state = random_state(robustbench_zoo.architecture(WRN))
    torch.save(state, place)
    check_filled(load_model(f"robustbench:{WRN}"), state)


def test_robustbench_without_network_for_timm(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ModelError, match=rf"cannot fetch https://github\.com/RobustBench/\S+ to {tmp_path}.*--weights"):
        load_model("robustbench:Linf/cifar10/Debenedetti2022Light_XCiT-S12")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Linf/cifar10/Wang2023Better", "close: .*Linf/cifar10/Wang2023Better_WRN-28-10"),
        ("L1/cifar10/Standard", "has no model 'L1/cifar10/Standard', written as Linf/cifar10/NAME"),
        ("Standard", "written as Linf/cifar10/NAME"),
        ("Linf/imagenet/Standard_R50", "torchvision's own weights: use torchvision:resnet50"),
    ],
)
def test_unknown_robustbench_models(name, problem):
    with pytest.raises(ModelError, match=problem):
        load_model(f"robustbench:{name}")


def test_robustbench_s_stand_ins_are_gone():
    robustbench_compat.library()
    for name in ("pkg_resources", "autoattack", "autoattack.state"):
        assert name not in sys.modules or sys.modules[name].__spec__.name == name


def test_robustbench_gets_no_stand_in_for_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "pkg_resources.py").write_text("")
    (tmp_path / "autoattack.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in ("pkg_resources", "autoattack"):
            sys.modules.pop(name, None)
        with robustbench_compat._missing_modules():
            assert "autoattack" not in sys.modules
            assert Path(importlib.import_module("pkg_resources").__file__).parent == tmp_path
        assert "pkg_resources" in sys.modules


def test_robustbench_finds_its_own_files():
    loaders = importlib.import_module("robustbench.loaders") if robustbench_compat.library() else None
    path = loaders.pkg_resources.resource_filename("robustbench.loaders", "helper_files")
    assert Path(path).is_dir()


def test_robustbench_not_installed(monkeypatch):
    robustbench_compat.library.cache_clear()
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(ModelError, match=r"pip install 'meansparse_fx\[robustbench\]'"):
        load_model(f"robustbench:{WRN}")
    monkeypatch.undo()
    assert robustbench_compat.library().__name__ == "robustbench"


# The table. Activations called and gates among them, counted at run time over other code than ours.

COUNTS = {
    "torchvision:mobilenet_v2": (35, 0),
    "torchvision:regnet_y_400mf": (65, 16),
    "torchvision:shufflenet_v2_x0_5": (37, 0),
    "torchvision:squeezenet1_0": (26, 0),
    "timm:dla34": (33, 0),
    "timm:ese_vovnet19b_dw": (23, 0),
    "timm:ghostnet_100": (42, 7),
    "timm:hardcorenas_a": (32, 8),
    "timm:lcnet_050": (30, 2),
    "timm:poolformerv2_s12": (12, 0),
    "timm:rexnet_100": (46, 13),
    "timm:skresnet18": (33, 8),
    "robustbench:Linf/cifar10/Dai2021Parameterizing": (13, 0),
    "robustbench:Linf/cifar10/Rebuffi2021Fixing_R18_ddpm": (17, 0),
    "robustbench:Linf/cifar10/Wong2020Fast": (16, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_activation_is_accounted_for(name):
    model = build(name)
    size = min(64, input_shape(model)[-1])
    plan = msfx.inspect(model, torch.linspace(0, 1, 2 * 3 * size * size).view(2, 3, size, size))
    skipped = Counter(site.refusal.kind for site in plan if site.refusal)
    activations, gates = COUNTS[name]
    assert (len(plan), skipped) == (activations, Counter({"gate": gates} if gates else {}))


def test_the_table_resumes(tmp_path, monkeypatch):
    path = tmp_path / "zoo.csv"
    done = Row(model=MODELS[0], image=96, route="symbolic trace", checked="numbers", rewritten="activation:3", nodes=9)
    done |= {"skipped": "gate:2", "equal": "bitwise", "forward_cpu_s": 0.1, "capture_cpu_s": 0.1, "find_cpu_s": 0.1}
    done |= {"transform_cpu_s": 0.5}
    write([done], path)
    asked = []
    failed = Row(model=MODELS[1], error="SiteError: a | b")
    monkeypatch.setattr(table, "measure", lambda name: asked.append(name) or failed)
    for name in ("mha.set_fastpath_enabled",):
        monkeypatch.setattr(f"torch.backends.{name}", lambda _: None)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda _: None)
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    pattern = "|".join(re.escape(name) for name in MODELS[:2])
    monkeypatch.setattr(sys, "argv", ["zoo", "--only", f"^({pattern})$", "--out", str(path)])
    table.main()
    assert asked == [MODELS[1]]
    assert read(path) == [done, failed]
    text = zoo_page(Results(tmp_path))
    assert "1 of 2 models are transformed (50.0%)" in text
    assert "0 graphs to make the model's very operator calls, and compared 1 with it in numbers" in text
    assert f"| {failed.model} | SiteError: a \\| b |" in text


def test_a_row_of_the_table(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    with torch.no_grad():
        row = table.measure("torchvision:squeezenet1_0")
    assert (row.error, row.equal, row.rewritten, row.skipped) == ("", "bitwise", "activation:26", "")
    assert row.nodes > 26
    assert row.checked == "operations"
    assert min(row.capture_cpu_s, row.find_cpu_s, row.transform_cpu_s) > 0


def test_other_libraries_models_are_measured_in_all_that_they_return():
    row = table.measure("torchvision.models.segmentation:lraspp_mobilenet_v3_large")
    assert (row.equal, row.gradient, row.checked, row.error) == ("bitwise", "bitwise", "operations", "")
    assert "with torchvision 0." in row.torch
    results = SimpleNamespace(zoo=[row], extra=[row])
    assert "1 of 1 are transformed; 1 have every" in " ".join(zoo_page(results).split())
    one, two = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.full((2,), 1.5)}
    assert table._difference(one, two) == "5.0e-01"
    assert table._difference(tuple(one.values()), one) == "returns tuple of 0, 1 where the model returns dict of a, b"
