"""Exported files: standard operators only, the model's own results at any batch size, independent of the model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import feature_extraction
from typer.testing import CliRunner

import meansparse_fx as msfx
from meansparse_fx.bundled import load_model
from meansparse_fx.cli import app
from meansparse_fx.errors import ArtifactError, CaptureError, StateError
from meansparse_fx.export import FORMATS, export, to_exported_program

SUFFIX = {"export": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
# Printed by torch's exporters while they import or convert, whatever the model is.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def small():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 6, 3), nn.PReLU(6)),
        *(nn.Conv2d(6, 6, 1), nn.SiLU()),
        *(nn.Conv2d(6, 4, 1), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # so that alpha shows in the logits
    return net.eval(), torch.rand(6, 3, 12, 12)


def bundled():
    return load_model(), torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def sparse_of(make, **arguments):
    net, images = make()
    sparse = msfx.transform(net, images, **arguments)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.4)
    return sparse, images


def run(format, path, images):
    if format == "export":
        return torch.export.load(path).module()(images)
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))(images)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, bundled])
@pytest.mark.parametrize("format", FORMATS)
def test_files_compute_what_the_model_computes(tmp_path, make, format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    sparse, images = sparse_of(make)
    os.umask(umask := os.umask(0))
    path = export(sparse, images, tmp_path / f"model{SUFFIX[format]}", format)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    if format == "onnx":
        inputs = pytest.importorskip("onnx").load(path).graph.input
        assert [i.type.tensor_type.shape.dim[0].dim_param for i in inputs] == ["batch"]
    with torch.no_grad():
        expected = sparse(images)
        msfx.set_alpha(sparse, 0.0)
        assert not torch.allclose(sparse(images), expected, atol=1e-4)  # the file keeps the alpha it was written with
        for batch in (images, images[:1], images.repeat(3, 1, 1, 1)):
            own = run(format, path, batch)
            torch.testing.assert_close(own[: len(expected)], expected[: len(own)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["mean", "edge", "smooth"])
@pytest.mark.parametrize("backward", ["exact", "identity", "smooth"])
def test_programs_hold_standard_operators_only(variant, backward):
    sparse, images = sparse_of(small, backward=backward)
    msfx.set_variant(sparse, variant)
    program = to_exported_program(sparse, images)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in targets), targets
    assert not {node.op for node in program.graph.nodes} - {"placeholder", "call_function", "output"}
    # No trace of how a gradient is told: the same graph for every backward mode.
    assert not any("detach" in target or "isfinite" in target for target in targets - {"aten.isfinite.default"})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), sparse(images), rtol=1e-5, atol=1e-6)
    kept = {name.rpartition(".")[2] for name in [*program.state_dict, *program.constants] if "meansparse" in name}
    assert kept <= {"centre", "threshold"}
    assert len(msfx.operators(sparse)) == 4


def test_the_model_is_left_as_it_was():
    sparse, images = sparse_of(small, backward="identity")
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    to_exported_program(sparse, images[:1])
    assert before.keys() == sparse.state_dict().keys()
    assert all(torch.equal(tensor, sparse.state_dict()[name]) for name, tensor in before.items())
    assert {operator.backward for operator in msfx.operators(sparse).values()} == {"identity"}


class Extractor(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = feature_extraction.create_feature_extractor(body, {"2": "features"})

    def forward(self, x):
        return self.body(x)["features"]


def extracting():
    """Holds a feature extractor of torchvision: its copies by `copy.deepcopy` are in train mode."""
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU()).eval()
    return nn.Sequential(Extractor(body), nn.Conv2d(3, 2, 3), nn.ReLU())


def scripted():
    """Holds a function that `copy.deepcopy` refuses."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    model.double = torch.jit.script(_doubled)
    return model


def _doubled(x):
    return 2 * x


@pytest.mark.parametrize("make", [extracting, scripted])
def test_what_deepcopy_refuses_or_changes_is_exported(make):
    images = torch.rand(4, 1, 8, 8)
    model = make().eval()
    sparse = msfx.transform(model, images)
    msfx.calibrate(sparse, [images], progress=False)
    sparse(images)
    torch.testing.assert_close(to_exported_program(sparse, images).module()(images), model(images))
    assert msfx.cost(model, images).sites


def test_a_fixed_batch_is_fixed():
    sparse, images = sparse_of(small)
    program = to_exported_program(sparse, images, dynamic_batch=False)
    assert program.module()(images).shape == (6, 5)
    with pytest.raises((AssertionError, RuntimeError)):  # torch's own guard, which changed its type between releases
        program.module()(images[:2])


@pytest.mark.slow
def test_programs_run_without_this_package(tmp_path):
    sparse, images = sparse_of(small)
    path = export(sparse, images, tmp_path / "model.pt2")
    code = f"""
import sys, torch
y = torch.export.load({str(path)!r}).module()(torch.zeros(2, 3, 12, 12))
print(tuple(y.shape), any(name.startswith("meansparse") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 5) False"


def test_command(tmp_path):
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU())\n"
    )
    model = f"{tmp_path / 'small_net.py'}:net"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU()).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    images = torch.rand(3, 1, 8, 8)
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images], progress=False).save(tmp_path / "s.safetensors")
    msfx.set_alpha(sparse, 0.5)
    options = {"--weights": "weights.pt", "--statistics": "s.safetensors", "--out": "m.pt2"}
    paths = [str(v) for key, name in options.items() for v in (key, tmp_path / name)]
    done = CliRunner().invoke(app, ["export", model, *paths, "--alpha", "0.5", "--input-shape", "1,8,8"])
    assert done.exit_code == 0, done.output
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), sparse(images))


# Bad input.


def test_what_cannot_be_exported(tmp_path):
    net, images = small()
    with pytest.raises(StateError, match="no MeanSparse operators"):
        export(net, images, tmp_path / "m.pt2")
    sparse = msfx.transform(net, images)
    with pytest.raises(StateError, match=r"2: no statistics: calibrate .* before export"):
        export(sparse, images, tmp_path / "m.pt2")
    msfx.calibrate(sparse, [images], progress=False)
    with pytest.raises(ArtifactError, match="no export format 'jit': use one of export, aoti, onnx"):
        export(sparse, images, tmp_path / "m.pt2", "jit")
    with pytest.raises(ArtifactError, match=r"m\.pt2: a file of format 'onnx' ends in \.onnx"):
        export(sparse, images, tmp_path / "m.pt2", "onnx")
    with pytest.raises(ArtifactError, match="its directory does not exist"):
        export(sparse, images, tmp_path / "nowhere" / "m.pt2")
    with pytest.raises(StateError, match="train mode"):
        export(sparse.train(), images, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    sparse, images = sparse_of(small)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ArtifactError, match=r"ONNX export needs onnx and onnxscript: pip install 'meansparse_fx\[onnx\]'"
    ):
        export(sparse, images, tmp_path / "m.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_torch_cannot_export():
    sparse, images = sparse_of(small)
    with pytest.raises(CaptureError, match=r"torch.export cannot take this model; dynamic_batch=False .*channels"):
        to_exported_program(sparse, images[:, :2])
