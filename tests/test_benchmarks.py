"""Every benchmark at a size that costs seconds: what its rows say, and that the page is what the files say."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from benchmarks import attack, calibration, contenders, harness, host, kernels, models, scaling
from benchmarks.contenders import WideResNet
from benchmarks.harness import COLUMNS, RESULTS, Row, measure, on_gpu, read, write
from benchmarks.models import CONTENDERS, Case
from benchmarks.page import __main__ as pages
from benchmarks.page import speed
from benchmarks.page.markdown import between_marks
from benchmarks.page.results import Results, mark
from benchmarks.page.targets import TARGETS, Target, wins
from meansparse_fx import bundled
from meansparse_fx.data import ImageSet
from meansparse_fx.errors import ModelError
from meansparse_fx.zoo import robustbench_compat

ROOT = harness.ROOT
EAGER = [name for name in CONTENDERS if name not in models.COMPILED]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    """A model of benchmarks that costs nothing."""
    monkeypatch.setitem(contenders.MODELS, "tiny", (lambda: WideResNet(10, 1), 8))
    return "tiny"


def main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def row(benchmark="models", case="WRN-16-4 8x3x32x32 forward", contender="ours", ratio=1.0, **more) -> Row:
    known = {"benchmark": benchmark, "case": case, "contender": contender, "baseline": "base", "repetitions": 5}
    known |= {"milliseconds": 10.0, "low": 9.0, "high": 11.0, "device": "Some CPU", "torch": "2.14", "threads": 2}
    return Row(**known | {"ratio": ratio} | more)


# The harness.


def test_measure_takes_turns_and_names_its_baseline():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    rows = measure("x", "y", calls, {"a": "a", "b": "a"}, "cpu", 4, {"b": {"graphs": 3}}, warm_up=1)
    assert order == ["a", "b"] * 5
    assert [(r.contender, r.baseline, r.graphs, r.repetitions) for r in rows] == [("a", "a", None, 4), ("b", "a", 3, 4)]
    assert rows[0].ratio == 1
    assert all(r.low <= r.milliseconds <= r.high for r in rows)
    (single,) = measure("x", "y", {"a": lambda: None}, "a", "cpu", 1)
    assert single.low == single.milliseconds == single.high


def test_rows_come_back_from_a_file(tmp_path):
    rows = [row(kept_bytes=7, of_clone=0.5), row(graphs=2)]
    write(rows, tmp_path / "a" / "rows.csv")
    assert read(tmp_path / "a" / "rows.csv") == rows


def test_columns_are_known(tmp_path):
    with pytest.raises(ValueError, match="no column millisecond"):
        row(millisecond=1.0)
    with pytest.raises(AttributeError, match="no column millisecond"):
        _ = row().millisecond
    path = tmp_path / "rows.csv"
    path.write_text("case,chosen,convicted,ratio,commit\na,True,False,,1234567\n")
    (found,) = read(path)
    assert found == {"case": "a", "chosen": True, "convicted": False, "commit": "1234567"}
    assert (found.ratio, found.commit, found.contender) == (None, "1234567", "")
    path.write_text("case,mood\na,b\n")
    with pytest.raises(KeyError, match="mood"):
        read(path)
    path.write_text("kept")
    with pytest.raises(ValueError, match="no rows"):
        write([], path)
    assert path.read_text() == "kept"


def test_every_column_is_explained():
    """And none is there that no file has, but for those of a choice that may not have been measured."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    lists = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    assert {name for names in lists for name in re.findall(r"`(\w+)`", names)} == COLUMNS.keys()
    paths = [*RESULTS.glob("*.csv"), ROOT / "benchmarks/paper/published.csv"]
    unseen = COLUMNS.keys() - {name for path in paths for row in read(path) for name in row}
    unseen -= {name for name in COLUMNS if name.startswith("selection_")}
    assert unseen <= {"search", "setting", "chosen", "clean_change"}


@pytest.mark.parametrize("mode", models.MODES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", models.DTYPES)
def test_a_case_can_be_read_again(mode, channels_last, dtype):
    case = Case("ResNet-50", 4, 224, mode, channels_last, dtype)
    assert Case.read(str(case)) == case


def test_what_is_no_case():
    with pytest.raises(ValueError, match="no case"):
        Case.read("WRN-16-4 8x3x32x32 sideways")


# Whole models.


def test_eager_models(tiny):
    forward, gradient = (
        {r.contender: r for r in models.rows_of(Case(tiny, 2, 8, mode), "cpu", 2, compiled=False)}
        for mode in ("forward", "images' gradient")
    )
    assert list(forward) == list(gradient) == EAGER
    counts = {form: c for form, c in msfx.cost(WideResNet(10, 1).eval(), torch.rand(2, 3, 8, 8)).total.items()}
    base, fused = counts["base"], counts["ours, fused"]
    assert all(r.kept_bytes is None and r.graphs is None and r.baseline == "base" for r in forward.values())
    assert forward["ours"].launches == forward["base"].launches
    assert forward["base"].launches - forward["ours, fused"].launches == base.forward.calls - fused.forward.calls
    # Once, at a site: its value asked and compared, a root, a product, and four passes; eight calls.
    sites = 7
    assert forward["published module"].launches - forward["base"].launches == 8 * sites
    # Fused, nobody keeps what is pooled, [2, 64, 2, 2].
    pooled = 4 * 2 * 64 * 2 * 2
    for name, form, less in (("ours", "ours", 0), ("ours, fused", "ours, fused", pooled),
                             ("published module", "published", 0)):  # fmt: skip
        more = counts[form].kept - base.kept - less
        assert gradient[name].kept_bytes - gradient["base"].kept_bytes == more, name
    assert gradient["ours"].kept_bytes == gradient["base"].kept_bytes < gradient["published module"].kept_bytes
    assert all(r.peak_bytes > 0 and r.ratio > 0 and r.repetitions == 2 for r in gradient.values())


def test_all_gradients_leave_out_what_has_frozen_norms(tiny):
    rows = models.rows_of(Case(tiny, 2, 8, "all gradients", channels_last=True), "cpu", 1, compiled=False)
    assert [r.contender for r in rows] == [name for name in EAGER if name != "ours, fused"]
    assert {r.case for r in rows} == {"tiny 2x3x8x8 all gradients channels_last"}


def test_half_precision(tiny):
    rows = models.rows_of(Case(tiny, 2, 8, "forward", dtype="bfloat16"), "cpu", 1, compiled=False)
    assert [r.contender for r in rows] == EAGER
    assert {r.case for r in rows} == {"tiny 2x3x8x8 forward bfloat16"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own, at a graph break
def test_compiled_models(monkeypatch):
    def two_sites():
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4 * 4 * 4, 3))

    monkeypatch.setitem(contenders.MODELS, "small", (two_sites, 8))
    rows = {r.contender: r for r in models.rows_of(Case("small", 2, 8, "images' gradient"), "cpu", 1, cold=True)}
    assert list(rows) == [name for name in CONTENDERS if "reduce" not in name]
    assert rows["ours compiled"].graphs == rows["base compiled"].graphs == 1
    assert rows["published module compiled"].graphs > 2
    assert rows["ours compiled"].kept_bytes <= rows["base compiled"].kept_bytes
    assert rows["ours compiled"].baseline == "base compiled"
    for name, found in rows.items():
        assert (found.compile_seconds is not None) == name.endswith("compiled"), name
        assert (found.launches is None) == name.endswith("compiled"), name


def test_a_wrong_contender_is_not_timed(tiny, monkeypatch):
    good, far = (torch.ones(4),), (torch.full((4,), 1.5),)
    right = {"base": (torch.full((4,), 1.2),), "branch-free module": good, "ours": good}
    models.check(right, "forward", 1e-3)
    with pytest.raises(AssertionError, match=r"ours, forward: relative error 5\.0e-01"):
        models.check(right | {"ours": far}, "forward", 1e-3, amplified=True)
    with pytest.raises(AssertionError, match="error nan"):
        models.check(right | {"ours": (torch.full((4,), float("nan")),)}, "forward", 1e-3)

    case = Case(tiny, 2, 8, "images' gradient")
    models.check_exactly(case, "cpu")
    own = models.build

    def other(change):
        def build(*args, **kwargs):
            contenders, *given = own(*args, **kwargs)
            change(contenders)
            return contenders, *given

        monkeypatch.setattr(models, "build", build)

    other(lambda found: msfx.set_backward(found["ours, fused"], "identity"))
    with pytest.raises(AssertionError, match=r"ours, fused, tiny .* in float64"):
        models.check_exactly(case, "cpu")
    other(lambda found: found.update(dict.fromkeys(found, found["base"])))
    with pytest.raises(AssertionError, match="nothing would be seen"):
        models.check_exactly(case, "cpu")


def test_models_that_are_not_there_are_skipped(tiny, monkeypatch, tmp_path, capsys):
    def missing():
        raise ModelError("robustbench is not installed")

    monkeypatch.setitem(contenders.MODELS, "missing", (missing, 8))
    out = tmp_path / "models-cpu-1-thread.csv"
    write([row(case="other 1x3x8x8 forward"), row(case="tiny 2x3x8x8 forward", contender="old")], out)
    options = ("--mode", "forward", "--batch", 2, "--eager", "--repetitions", 2, "--device", "cpu")
    main(models, monkeypatch, "--model", "missing", tiny, *options, "--out", out)
    assert "skipped missing 2x3x8x8 forward: robustbench is not installed" in capsys.readouterr().out
    rows = read(out)
    assert [r.contender for r in rows] == ["ours", *EAGER]
    assert rows[0].case == "other 1x3x8x8 forward"


def test_a_case_that_fails_does_not_keep_the_others(tmp_path, capsys):
    def fails():
        raise AssertionError("wrong")

    out = tmp_path / "rows.csv"
    write([row(case="b"), row(case="a", contender="old"), row(case="fails")], out)
    with pytest.raises(SystemExit, match="FAILED fails: wrong"):
        harness.run({"fails": fails, "a": lambda: [row(case="a")]}, out)
    assert [(r.case, r.contender) for r in read(out)] == [("b", "ours"), ("a", "ours"), ("fails", "ours")]


def test_every_architecture_names_its_package(monkeypatch):
    robustbench_compat.library.cache_clear()
    for package in ("robustbench", "timm", "torchvision.models"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in contenders.MODELS:
        if name.startswith("WRN"):
            continue
        with pytest.raises(ModelError, match="is not installed"):
            contenders.build(name)


# Kernels, calibration.


def test_bandwidth_counts_the_streams():
    rows = [row("kernels", contender=n, milliseconds=ms) for n, ms in (("clone", 2.0), ("meansparse_fx", 4.0))]
    assert [r.of_clone for r in kernels.with_bandwidth(rows, "forward")] == [1.0, 0.5]
    assert [r.of_clone for r in kernels.with_bandwidth(rows, "backward")] == [1.0, 0.75]
    rows[1]["contender"] = "torch.var_mean"
    assert [r.of_clone for r in kernels.with_bandwidth(rows, "moments+activation")] == [1.0, 0.25], "it only reads"


@pytest.fixture
def stubbed_gpu(monkeypatch):
    """A device whose streams and graphs do nothing but replay, in half a millisecond."""

    class Graph:
        replay = staticmethod(lambda: None)

    names = ("Stream", "current_stream", "synchronize")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    testing = ModuleType("triton.testing")
    testing.do_bench = lambda call, warmup, rep, return_mode: call() or 0.5
    monkeypatch.setitem(sys.modules, "triton.testing", testing)


def test_calls_stand_beside_torchs_own_of_the_same_direction(monkeypatch, tmp_path):
    times = {name: [1.0, 2.0, 4.0] for name in host.calls("cpu")}
    times |= {"operator, ReLU": [3.0] * 3, "forward+backward: operator, ReLU": [1.5, 3.0, 6.0]}
    times["conv, batch norm, ReLU"] = [2.0, 4.0, 8.0]
    monkeypatch.setattr(host, "in_turns", lambda *_, **__: times)
    main(host, monkeypatch, "--repetitions", 3, "--device", "cpu", "--out", tmp_path / "host.csv")
    found = {(r.case, r.contender): r for r in read(tmp_path / "host.csv")}
    assert len(found) == len(times)
    assert [found["forward", name].ratio for name in ("operator, ReLU", "module, ReLU")] == [1.5, 1.0]
    own = found["forward+backward", "operator, ReLU"]
    assert (own.ratio, own.host_ms, own.baseline) == (1.5, 3.0, "F.relu")
    assert found["forward", "conv, fused module"].ratio == 0.5


def test_device_and_host_time_are_columns_of_their_own(stubbed_gpu):
    def no_graph_holds_this():
        raise RuntimeError("operation not permitted when stream is capturing")

    asked = []
    makes = {
        "a": lambda: lambda: asked.append(1),
        "b": lambda: lambda: time.sleep(1e-3),
        "c": lambda: lambda: None,
    }
    found = on_gpu(makes, "a", skip=("c",))
    assert found["a"]["device_ms"] == found["b"]["device_ms"] == 0.5
    assert found["b"]["device_ratio"] == 1
    assert found["c"]["device_ms"] is found["c"]["device_ratio"] is None
    assert found["b"]["host_ms"] >= 1 > found["a"]["host_ms"] > 0
    assert len(asked) > 10
    rows = measure("x", "y", {"a": lambda: None, "b": lambda: None}, "a", "cpu", 1, more=found)
    assert [row.device_ms for row in rows] == [0.5, 0.5]
    assert all(row.date and row.commit for row in rows)
    assert harness.device_ms(lambda: no_graph_holds_this) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "layout"), [("2x3x4x4", "channels_last"), ("2x5x6", "tokens")])
@pytest.mark.parametrize("mode", ["forward", "backward", "moments", "moments+activation"])
def test_kernels(stubbed_gpu, dtype, shape, layout, mode):
    """Every contender stays in the dtype of its tensor, and computes what the operator does."""
    case = f"{shape} {dtype} {layout} gelu {mode}"
    x, dim = kernels.tensor(shape, layout, getattr(torch, dtype), "cpu")
    found = on_gpu(kernels.contenders(x, dim, "gelu", mode, False), "clone")
    assert all(facts["device_ms"] == 0.5 for facts in found.values())
    rows = kernels.rows_of(case, "cpu", 2, False)
    assert {row.case for row in rows} == {case}
    assert [row.contender for row in rows if row.contender in ("clone", "meansparse_fx")] == ["clone", "meansparse_fx"]
    assert all(row.of_clone > 0 for row in rows)
    assert ("published form" in {row.contender for row in rows}) == (not mode.startswith("moments"))


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    x, dim = kernels.tensor("2x3x4x4", "channels_last", torch.bfloat16, "cpu")
    monkeypatch.setattr(kernels.ops, "mean_sparse", lambda x, *_: x)
    with pytest.raises(AssertionError, match=r"meansparse_fx, relu forward: .* of the elements are wrong"):
        kernels.contenders(x, dim, "relu", "forward", False)


@pytest.mark.slow
@pytest.mark.skipif("DRY_RUN" not in os.environ, reason="takes minutes: DRY_RUN=1 runs it")
def test_the_gpu_script_runs_dry(tmp_path):
    """Every step of it that a CPU can do at a tiny size, from a wheel of this checkout."""
    environment = os.environ | {"RESULTS": str(tmp_path), "BUDGET": "800"}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", sys.executable, "dry"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = ("host", "kernels", "models", "attack", "calibration", "scaling")
    assert {path.name for path in tmp_path.glob("*.csv")} == {f"{kind}-cpu-dry.csv" for kind in kinds}


def test_calibration(monkeypatch, tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    monkeypatch.setattr(calibration, "models", lambda *_: {"tiny": (net, list(torch.rand(8, 1, 6, 6).split(4)))})
    # What is not measured again stays in the file: another model, and this one through torch.compile.
    held = [row("calibration", "other", "x"), row("calibration", "tiny", "x", baseline="plain forward, compiled")]
    write([*held, row("calibration", "tiny", "old", baseline="plain forward")], tmp_path / "c.csv")
    main(calibration, monkeypatch, "--case", "tiny", "--repetitions", 2, "--device", "cpu", "--out", tmp_path / "c.csv")
    assert read(tmp_path / "c.csv")[:2] == held
    rows = read(tmp_path / "c.csv")[2:]
    assert [r.contender for r in rows] == 2 * ["plain forward", "meansparse_fx.calibrate", "published form"]
    assert [r.case for r in rows] == 3 * ["tiny"] + 3 * ["tiny, an image more"]
    assert {r.baseline for r in rows} == {"plain forward"}


def test_an_image_costs_what_a_longer_pass_takes_longer():
    times = {"plain forward": 10.0, "meansparse_fx.calibrate": 110.0}
    times |= {"plain forward, twice": 20.0, "meansparse_fx.calibrate, twice": 122.0}
    rows = [row("calibration", "c", name, milliseconds=ms) for name, ms in times.items()]
    found = calibration.more_images(rows, 100)
    assert [r.milliseconds for r in found] == pytest.approx([0.1, 0.12])
    assert [r.ratio for r in found] == pytest.approx([1.0, 1.2])


def test_images_that_a_tolerance_takes(monkeypatch, tmp_path):
    images, labels = bundled.load_split("calibration")
    data = ImageSet(images[:512], labels[:512], "some images")
    monkeypatch.setattr(calibration, "load_images", lambda *_: data)
    monkeypatch.setattr(calibration, "TOLERANCES", (0.5,))
    own = msfx.calibrate

    def stopping(sparse, batches, tolerance=None):  # as it does on thousands of images
        return own(sparse, batches[:2] if tolerance else batches, progress=False)

    monkeypatch.setattr(msfx, "calibrate", stopping)
    whole, some = calibration.images_needed(tmp_path)
    assert (whole.images, whole.mean_error, whole.std_error, whole.test_images) == (512, 0, 0, 512)
    assert some.images == 2 * calibration.BATCH
    assert 0 < some.mean_error < 0.5
    assert abs(some.accuracy - whole.accuracy) < 0.1


# Attacks.


def test_passes_are_counted():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(3, 1, 2, 2, requires_grad=True)
    with attack.counted(model) as passes:
        torch.autograd.grad(model(images).sum(), images)
        with torch.no_grad():
            model(images[:2])
    model(images)
    assert passes == {"forward_images": 5, "backward_images": 3}


def test_attacks_ask_all_models_for_the_same(monkeypatch, tmp_path):
    monkeypatch.setitem(attack.VERSIONS, "standard", ("apgd-ce", "square"))
    out = tmp_path / "attack.csv"
    options = ("--images", 3, "--pool", 10, "--steps", 2, "--queries", 3, "--repetitions", 2, "--device", "cpu")
    main(attack, monkeypatch, *options, "--model", "WRN-10-1", "--out", out)
    rows = read(out)
    cases = {case: list(group) for case, group in itertools.groupby(rows, lambda r: r.case)}
    assert list(cases) == [
        "bundled apgd-ce, 3 images, 2 steps",
        "bundled autoattack standard, 3 images, 2 steps, 3 queries",
        "WRN-10-1 apgd-ce, 3 images, 2 steps",
    ]
    for case, found in cases.items():
        assert [r.contender for r in found] == ["base", "published module", *attack.CONTENDERS]
        assert found[0].backward_images == 3 * 3  # the start and two steps
        if case.startswith("bundled"):  # no model loses one: same work for all
            assert len({(r.forward_images, r.backward_images) for r in found}) == 1
            assert all(r.ratio_per_pass == pytest.approx(r.ratio) for r in found)
    assert (
        cases["bundled autoattack standard, 3 images, 2 steps, 3 queries"][0].forward_images > found[0].forward_images
    )


def test_images_that_break_are_not_taken():
    images, labels = (part[:6] for part in bundled.load_split("selection"))
    model = bundled.load_model()
    wrong = (labels + 1) % 10
    mixed = torch.where(torch.arange(6) < 3, wrong, labels)
    chosen, kept = attack.unbroken({"base": model}, (images, mixed), 2, 1)
    assert len(chosen) == 1
    assert any(torch.equal(chosen[0], images[i]) and kept[0] == labels[i] for i in range(3, 6))
    with pytest.raises(SystemExit, match="raise --pool"):
        attack.unbroken({"base": model}, (images, wrong), 2, 1)


# Growth.


def test_scaling(tiny, monkeypatch, tmp_path):
    out = tmp_path / "scaling.csv"
    options = ("--depth", 10, 16, "--images", 2, 4, "--channels", 2, 3, "--plan", tiny, "--devices", 1, 4)
    main(scaling, monkeypatch, *options, "--batch", 2, "--repetitions", 1, "--device", "cpu", "--out", out)
    rows = read(out)
    assert [(r.what, r.case, r.size, r.unit) for r in rows if r.what == "calibration"] == [
        ("calibration", "2 images, 2 channels", 2, "images"),
        ("calibration", "4 images, 2 channels", 4, "images"),
        ("calibration", "2 images, 2 channels", 2, "channels"),
        ("calibration", "2 images, 3 channels", 3, "channels"),
        ("calibration", tiny, 2, "images"),
        ("calibration", tiny, 4, "images"),
    ]
    small, large = (r for r in rows if r.what == "transform")
    # One block a group more: two norms, two activations, two convolutions and a sum.
    assert (small.case, large.case, large.size - small.size) == ("WRN-10-1", "WRN-16-1", 3 * 7)
    for r in rows:
        assert r.seconds > 0
        if r.what == "plan":
            once, images, number, each, merges, merging = (
                float(n.replace(",", "")) for n in re.findall(r"[\d.,]+(?:e[+-]\d+)?", r.formula)
            )
            assert (images, number, merges) == (1e6, r.size, r.size - 1)
            assert r.seconds == pytest.approx(once + images / number * each / 1e3 + merges * merging / 1e3, rel=0.02)


# The page.


def test_the_counts_kept_are_todays():
    kept = read(RESULTS / "roofline.csv")
    today = contenders.counts("WRN-16-4")
    assert [count for count in kept if count.case == "WRN-16-4"] == [{n: c[n] for n in kept[0]} for c in today]
    assert {count.case for count in kept} >= {"WRN-16-4", "WRN-28-10", "ResNet-50", "ConvNeXt-T", "Swin-T"}


def test_counts_of_one_model_leave_the_others(monkeypatch, tmp_path, root):
    path = tmp_path / "roofline.csv"
    counted = contenders.counts("WRN-10-1")
    others = [row.but(case="other") for row in counted]
    write([counted[0].but(site_count=99), *others], path)
    main(pages, monkeypatch, "--count", "WRN-10-1", "--results", tmp_path, "--root", root)
    assert read(path) == counted + others


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("performance", "kernels", "robustness", "paper", "zoo")))


@pytest.fixture
def root(tmp_path):
    """A folder with README and docs as they are."""
    (tmp_path / "docs").mkdir()
    for path in PAGES:
        (tmp_path / path).write_text((ROOT / path).read_text())
    return tmp_path


def test_the_committed_pages_are_what_the_files_say(monkeypatch, root, capsys):
    main(pages, monkeypatch, "--root", root, "--summary")
    assert len(capsys.readouterr().out.splitlines()) <= 40
    for path in PAGES:
        assert (root / path).read_text() == (ROOT / path).read_text(), "run python -m benchmarks.page"
    for path in ("README.md", "docs/kernels.md"):
        text = (ROOT / path).read_text()
        assert "not yet measured" not in text
        assert "NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, commit 19197a7, 2026-11-26" in text
    page = (root / "docs/performance.md").read_text()
    assert "{{" not in page
    assert "not measured" not in page.lower(), "every kind has a file"
    for plot in re.findall(r"!\[.*\]\((.*)\)", page + (root / "docs/paper.md").read_text()):
        for folder in (root, ROOT):
            assert (folder / "docs" / plot).read_bytes().startswith(b"\x89PNG")


def test_without_files_nothing_was_measured(root):
    pages.write_pages(Results(root / "nothing"), root)
    for name in ("robustness", "zoo"):
        assert (root / f"docs/{name}.md").read_text() == (ROOT / f"docs/{name}.md").read_text(), "no file says anything"
    assert not list(root.glob("**/*.png"))
    assert "Whole models have not been measured." in (root / "README.md").read_text()
    page = (root / "docs/performance.md").read_text()
    assert "![" not in page
    assert page.count("| not measured |") == len(TARGETS)
    assert "met |" not in page
    assert page.count(speed.NOTHING) == 10, "every section but that of the targets"


@pytest.mark.parametrize(
    ("figures", "least", "verdict"),
    [
        ([], False, "not measured"),
        ([1.0, 1.02], False, "met"),
        ([1.024], False, "met"),  # reads 1.02
        ([1.026], False, "**missed**"),
        ([1.0, 1.03], False, "**missed** in 1 of 2"),
        ([1.02], True, "met"),
        ([1.0, 1.1], True, "**missed** in 1 of 2"),
        ([float("nan")], False, "**missed**"),
    ],
)
def test_verdicts(figures, least, verdict, tmp_path):
    rows = [row(case=f"case {value}", ratio=value) for value in figures]
    if rows:
        write(rows, tmp_path / "models-f.csv")
    cells = Target("t", 1.02, "models", None, least=least).line(Results(tmp_path))
    assert cells[2] == verdict
    assert cells[4] == ("`models-f.csv`" if figures else "")


def test_the_page_copes_with_whatever_there_is(tmp_path):
    case = "WRN-16-4 8x3x32x32 images' gradient"
    rows = [
        row(case=case, contender="base", kept_bytes=100),
        row(case=case, contender="ours", ratio=1.2, kept_bytes=90),
        row(case="Unknown 1x3x9x9 forward bfloat16", contender="ours compiled", ratio=1.3, graphs=2),
    ]
    write(rows, tmp_path / "models-cpu-2-threads.csv")
    write([r.but(ratio=0.9) for r in rows[:2]], tmp_path / "models-Some-GPU.csv")
    (tmp_path / "roofline.csv").write_text((RESULTS / "roofline.csv").read_text())
    found = Results(tmp_path)
    assert [(source.name, source.gpu) for source in found.models] == [
        ("models-Some-GPU.csv", True),
        ("models-cpu-2-threads.csv", False),
    ]
    lines = {cells[0]: cells for cells in (target.line(found) for target in TARGETS)}
    assert lines["eager over base, CPU"][2:4] == ("**missed**", f"1.20 ({case})")
    assert lines["compiled over base compiled, CPU"][2] == "**missed**"
    assert lines["graphs of the compiled model"][2] == "**missed**"
    assert lines["bytes kept for backward over base"][2] == "met"
    assert lines["eager, fused, over base, GPU"][2] == "not measured"
    page = pages.performance_page(found)
    assert f"| {case}, ours | +0.0 | +2.00 |  |" in page
    assert "| ours against base (`models-cpu-2-threads.csv`) | 0 | 1 | 1.20 |" in page
    left, right = speed.figure_of(found.models).axes
    ratios = {line.get_label(): sorted(line.get_xdata()) for line in left.lines}
    assert (ratios["ours"], ratios["published module"]) == ([0.9, 1.2], [])
    assert [sorted(line.get_xdata()) for line in right.lines if line.get_marker() == "o"] == [[1.3]]


@pytest.mark.parametrize(
    ("benchmark", "contender", "case", "marked"),
    [
        ("models", "ours, fused", "c", True),
        ("models", "ours compiled", "c", False),
        ("models", "ours reduce-overhead", "c", False),
        ("models", "published module", "c", False),
        ("kernels", "meansparse_fx", "1x1x1x1 float32 channels_last relu forward", True),
        ("kernels", "meansparse_fx", "1x1x1x1 float32 channels_last moments", False),
        ("kernels", "flat prototype", "c", False),
        ("calibration", "meansparse_fx.calibrate", "c", False),
        ("host", "operator", "forward", True),
        ("host", "F.relu", "forward", False),
    ],
)
def test_what_the_replaced_kernels_did_is_marked(benchmark, contender, case, marked):
    found = row(benchmark, case, contender, commit="19197a7")
    assert (mark(found) == "†") == marked
    assert mark(found.but(commit="1234567")) == ""


def test_a_file_of_two_commits_says_both_and_marks_what_spans_them(tmp_path):
    new = row(commit="1234567", date="2026-12-01", ratio=0.9)
    old = new.but(case="WRN-16-4 1x3x32x32 forward", commit="19197a7", date="2026-11-26", ratio=1.2)
    rivals = [found.but(contender="published module", ratio=2.0) for found in (new, old)]
    write([new, old, *rivals], tmp_path / "models-Some-GPU.csv")
    found = Results(tmp_path)
    line = speed.headline(found)
    assert "commit 1234567, 2026-12-01, commit 19197a7, 2026-11-26" in line
    assert "ours 0.90 to 1.20†" in line
    assert ("ours† against published module", 2, 0) in [target[1:4] for target in wins(found)]


def test_shares_alone_make_a_table(tmp_path):
    nothing = {"milliseconds": None, "low": None, "high": None, "ratio": None, "commit": "19197a7"}
    own = row("kernels", "1x1x7x7 float32 channels_last relu forward", "meansparse_fx", of_clone=0.5).but(**nothing)
    write([own, own.but(contender="flat prototype", of_clone=0.9)], tmp_path / "kernels-Some-GPU.csv")
    found = Results(tmp_path)
    assert "| 1x1x7x7 float32 channels_last relu forward | 0.50† | 0.90 |" in speed.each(found.kernels, speed.kernels)
    lines = {cells[0]: cells for cells in (target.line(found) for target in TARGETS)}
    share = lines["kernel's share of the clone's bandwidth, forward, GPU"]
    assert share[2:4] == ("**missed**", "0.50 (1x1x7x7 float32 channels_last relu forward)†")


def test_moments_on_a_cpu_stand_beside_no_activation(tmp_path):
    case = "1x1x7x7 float32 channels_last relu moments"
    write([row("kernels", case, "meansparse_fx", of_clone=0.5)], tmp_path / "kernels-cpu-1-thread.csv")
    found = Results(tmp_path)
    assert f"| {case} |  |  | 1.00 |  |  |  | 50% |" in speed.each(found.kernels, speed.kernels)


def test_a_page_needs_its_marks(tmp_path):
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SystemExit, match="marks"):
        between_marks(tmp_path / "page.md", "performance", "text")


def test_every_command_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    programs = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()}
    programs |= {p.parent.name for p in (ROOT / "benchmarks").glob("*/__main__.py")}
    for name in programs:
        assert re.search(rf"`python -m benchmarks.{name}[` ]", listed)
    for path in (ROOT / "benchmarks").glob("*.sh"):
        assert f"`bash benchmarks/{path.name}`" in listed
        for module in re.findall(r"benchmarks\.(\w+)", path.read_text()):
            assert module in programs
