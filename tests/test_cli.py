"""The command line, as its user meets it: the whole job on a tiny model, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import meansparse_fx as msfx
from meansparse_fx import export, names, sites
from meansparse_fx.cli import COMMANDS, app
from meansparse_fx.cli.demo import ALPHAS
from meansparse_fx.cli.robustness import put_alpha
from meansparse_fx.data import load_images
from meansparse_fx.evaluate import Evidence, attacks, surrogates
from meansparse_fx.kernels import reference
from meansparse_fx.operators import added
from meansparse_fx.settings import Settings
from meansparse_fx.statistics import Statistics
from meansparse_fx.zoo import load_model

SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))

def bug():
    raise ZeroDivisionError("the user's own")
"""


@pytest.fixture(autouse=True)
def _small_work(monkeypatch):
    """Tiny tensors gain nothing from compiled kernels or from threads; on a busy machine both cost seconds."""
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tiny_cli.py").write_text(SOURCE)
    return f"{tmp_path / 'tiny_cli.py'}:net"


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, images=random.integers(0, 256, (30, 8, 8), np.uint8), labels=random.integers(0, 3, 30))
    return str(path)


@pytest.fixture
def statistics(tmp_path, model, data):
    path = tmp_path / "stats.safetensors"
    done = run("calibrate", model, "--data", data, "--out", path, "--limit", 20)
    assert done.exit_code == 0, done.output
    return path


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def check_error(done, *words):
    """Check for one line on stderr, after remarks on what is read, exit code 2 and no traceback."""
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    *remarks, error = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert all(remark.startswith(("images", "assumed: ")) for remark in remarks)
    for word in words:
        assert word in error


def test_version():
    done = run("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("meansparse-fx 0.")


def test_module_is_the_same_command():
    command = [sys.executable, "-m", "meansparse_fx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == run("--version").stdout


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_says_what_a_command_is_for(command):
    done = run(command, "--help", env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert "Usage" in done.stdout
    assert "…" not in done.stdout  # in 80 columns nothing is cut off


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_says_all_that_options_say(command):
    done = run(command, "--help", env={"COLUMNS": "160"})
    shown = " ".join(done.stdout.replace("│", " ").split())  # brackets are markup: what stood there would be missing
    for option in typer.main.get_command(app).commands[command].params:
        assert " ".join((option.help or "").split()) in shown
        assert not isinstance(option.show_default, str) or option.show_default in shown


def test_inspect(model):
    done = run("inspect", model, "--input-shape", "1,8,8")
    assert done.exit_code == 0, done.output
    assert "gelu" in done.stdout
    assert "1 of 1 sites rewritten" in done.stdout


def test_inspect_normalised(model):
    done = run("inspect", model, "--input-shape", "1x8x8", "--normalise", "0.5/0.25")
    assert done.exit_code == 0, done.output
    assert "model.2" in done.stdout


def test_cost(model):
    done = run("cost", model, "--input-shape", "1,8,8")
    assert done.exit_code == 0, done.output
    # 2 images of 4x6x6 values of 4 bytes, so 1,152 bytes a pass over the site; a norm, a gelu and their gradients.
    table = done.stdout
    assert "norm" in table
    assert "0.01 (4)" in table
    assert "0.01 (2)" in table
    assert "2 images, float32" in table


def test_show(statistics):
    done = run("show", statistics)
    assert done.exit_code == 0, done.output
    assert "1 sites, 20 images" in done.stdout
    assert "data.npz, 20 of 30" in done.stdout


def test_calibrate_with_every_option(tmp_path, model, data):
    out, kept = tmp_path / "s", tmp_path / "c"
    options = ("--batch-size", 1, "--histograms", "--checkpoint", kept, "--every", 0, "--channels-last")
    command = ("calibrate", model, "--data", data, "--out", out, *options, "--amp", "bfloat16", "--tolerance")
    assert run(*command, "50%").exit_code == 2
    done = run(*command, "1/2")
    assert done.exit_code == 0, done.output
    assert "0.5, reached" in done.stdout
    assert "in band" in done.stdout
    assert Statistics.load(out).images == 16
    assert not kept.exists()
    done = run("figures", out, "--site", "2", "--channel", 3, "--alpha", "0.2", "--out", tmp_path, "--format", "png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "histogram.png").read_bytes().startswith(b"\x89PNG")
    check_error(run("figures", out, "--site", "3", "--channel", 0), "no site '3'")
    assert run("calibrate", model, "--data", data, "--out", out, "--amp", "int8").exit_code == 2


def test_merged_halves_are_the_whole(tmp_path, model, data, statistics):
    first, second, third, whole, merged = (tmp_path / name for name in ("a", "b", "c", "whole", "merged"))
    for out, options in ((first, ("--limit", 13)), (second, ("--skip", 13)), (whole, ())):
        done = run("calibrate", model, "--data", data, "--out", out, "--batch-size", 1, *options)
        assert done.exit_code == 0, done.output
    done = run("merge", first, second, "-o", merged)
    assert done.exit_code == 0, done.output
    assert "1 sites, 30 images" in done.stdout
    got, expected = Statistics.load(merged), Statistics.load(whole)
    assert got.images == expected.images
    assert got["2"].count == expected["2"].count
    torch.testing.assert_close(got["2"].mean, expected["2"].mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got["2"].m2, expected["2"].m2, rtol=1e-12, atol=0)
    assert "data.npz, 13 of 30 + data.npz, 17 of 30 after 13" in run("show", merged).stdout
    done = run("calibrate", model, "--data", data, "--out", third, "--skip", 12)
    check_error(run("merge", first, third, "-o", merged), "8 % of the images of one are in the other")
    check_error(run("merge", first, first, "-o", merged), "same images")
    check_error(run("merge", first, "-o", merged), "two files")
    check_error(run("merge", first, data, "-o", merged), "not a statistics file")
    check_error(run("figures", merged, "--site", "2", "--channel", 0), "--histograms")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, model):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "many.npz", images=random.integers(0, 256, (1500, 8, 8), np.uint8),
             labels=random.integers(0, 3, 1500))  # fmt: skip
    command = [sys.executable, "-m", "meansparse_fx", "calibrate", model, "--data", tmp_path / "many.npz",
               "--batch-size", "1", "--histograms", "--every", "0"]  # fmt: skip
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    kept, interrupted, kills = tmp_path / "c", [*command, "--checkpoint", tmp_path / "c", "--out", tmp_path / "out"], 0
    for moment in (0.0, 0.3, 0.61):
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        process = subprocess.Popen(interrupted, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (kept.exists() and kept.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(moment)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3, "the calibration was over too soon to be killed: give it more images"
    subprocess.run(interrupted, check=True, capture_output=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob("*c*.partial*")) + list(tmp_path.glob(".c*")) + ([kept] if kept.exists() else [])


def test_select(tmp_path, model, data, statistics):
    done = run("select", model, "--data", data, "--statistics", statistics, "--alphas", "0.2,0.4", "--steps", 2,
               "--skip", 20, "--attacked", 5, "--eps", "8/255", "--report", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "10 held-out images, 5 of them attacked, Linf eps 0.03137, 2 steps" in done.stdout
    assert "\nalpha 0" in done.stdout
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert set(written) == {"search.json", "search.tex", "search.csv", "alpha.pdf", "tradeoff.pdf"}
    again = run("figures", tmp_path / "out" / "search.json", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert all(p.read_bytes() == written[p.name] for p in (tmp_path / "again").iterdir())
    check_error(run("figures", model.partition(":")[0]), "no meansparse_fx.evaluation or meansparse_fx.search")
    (tmp_path / "binary").write_bytes(b"\xff" * 5000)
    refused = [run("figures", tmp_path / "binary")]
    refused += [run("export", model, "--statistics", statistics, "--alpha", tmp_path / "binary", "--out", "a.pt2")]
    for alpha, reason in (
        ("1e39", "alpha must be finite and not negative, in float32"),
        ("abc", "abc: no such file"),
    ):
        done = run("export", model, "--statistics", statistics, "--alpha", alpha, "--out", tmp_path / "a.pt2")
        check_error(done, reason)
    for done in refused:
        check_error(done, "UnicodeDecodeError")
        assert len(done.stderr) < 1000  # and not the whole file


def test_evaluate_writes_a_report(tmp_path, model, data, statistics):
    done = run("evaluate", model, "--data", data, "--statistics", statistics, "--alpha", 0.3, "--eps", 0.05,
               "--steps", 2, "--attacks", "apgd-ce,apgd-dlr", "--backwards", "identity",
               "--report", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert " ".join(done.stdout.split()).count("images to tell") == 1, "the verdict is said once"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["alpha"] == 0.3
    assert report["threat"]["eps"] == 0.05
    assert set(report["sparse"]["robust"]) == {"apgd-ce/identity", "apgd-dlr/identity", "transfer"}
    assert report["data"]["test"] == "data.npz"
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "histogram.png").exists()


def test_demo_end_to_end(tmp_path):
    done = run("demo", "--out", tmp_path / "out", "--calibration-images", 40, "--selection-images", 12,
               "--test-images", 12, "--steps", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n_test"] == 12
    assert report["alpha"] in ALPHAS
    for which in ("base", "sparse"):
        assert {"apgd-ce/exact", "apgd-ce/identity"} <= set(report[which]["robust"])
        assert 0 <= report[which]["worst_case"] <= min(report[which]["robust"].values())
        assert report[which]["clean"] <= 1
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"report.json", "report.html", "statistics.msfx.safetensors", "evaluation.tex", "search.csv"}
    assert names >= {f"{name}.png" for name in ("alpha", "tradeoff", "evaluation", "histogram")}
    order = [done.stdout.index(w) for w in ("stem.2", "Calibrate on 40", "on 12 held-out", "on 12 test", "report.html")]
    assert order == sorted(order)
    assert " ".join(done.stdout.split()).endswith(report["headline"])


def test_errors_are_one_line(tmp_path, model, data, statistics):
    check_error(run("inspect", "timm:resnet81"), "close: resnet")
    check_error(run("inspect", model, "--input-shape", "1,8,8", "--device", "cuda:99"), "cuda:99")
    check_error(run("calibrate", model, "--data", data, "--out", tmp_path / "none" / "s"), "directory")
    check_error(run("show", data), "not a statistics file")
    attack = ("select", model, "--data", data, "--statistics", statistics)
    check_error(run(*attack, "--eps", 2), "eps 2 is more")
    check_error(run(*attack, "--attacks", "square/exact"), "uses no gradient")
    baked = ("export", model, "--statistics", statistics, "--alpha", 0.2, "--out")
    check_error(run(*baked, tmp_path / "a.onnx"), "ends in .pt2; format 'onnx' ends in .onnx")


def test_places_that_cannot_be_written(tmp_path, model, data, statistics, monkeypatch):
    attack = (model, "--data", data, "--statistics", statistics, "--steps", 1, "--skip", 20)
    calibrate = ("calibrate", model, "--data", data, "--out")
    (tmp_path / "full").symlink_to("/dev/full")
    check_error(run(*calibrate, tmp_path), "is a directory")
    check_error(run(*calibrate, "/proc/s"), "/proc/s: cannot be written")
    check_error(run("select", *attack, "--alphas", "0.2", "--attacked", 4, "--out", tmp_path), "is a directory")
    check_error(run("evaluate", *attack, "--alpha", 0.2, "--out", statistics), "is a file")
    check_error(run("merge", statistics, statistics, "--out", tmp_path), "is a directory")
    check_error(run("demo", "--out", statistics), "is a file")
    baked = ("--input-shape", "1,8,8", "--statistics", statistics, "--alpha", 0.2, "--out")
    check_error(run("export", model, *baked, tmp_path / "none" / "a.pt2"), "directory does not exist")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = run(*calibrate, tmp_path / "full")
    check_error(done, "No space left on device")
    assert Statistics.load(re.search(r"kept as (\S+): move", done.stderr)[1]).images == 30
    done = run("select", *attack, "--alphas", "0.2", "--attacked", 4, "--out", tmp_path / "full")
    check_error(done, "No space left on device")
    assert Settings.load(re.search(r"kept as (\S+): move", done.stderr)[1]).choice["leader"] in (0, 0.2)


def test_the_users_disk_is_no_bug(model, data, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr("meansparse_fx.cli.loading.open_images", no_space)
    check_error(run("calibrate", model, "--data", data, "--out", "s"), "somewhere: No space left on device")


def test_dry_runs_say_how_long_and_write_nothing(tmp_path, model, data, statistics, monkeypatch):
    left = []
    monkeypatch.setattr("meansparse_fx.cli.loading.leave_processes", left.append)
    calibrate = ("calibrate", model, "--data", data, "--out", tmp_path / "s", "--batch-size", 10)
    attack = (model, "--data", data, "--statistics", statistics, "--steps", 1, "--skip", 20, "--batch-size", 5,
              "--checkpoint", tmp_path / "c", "--attacks", "pgd")  # fmt: skip
    before = {*tmp_path.iterdir()}
    for command, count, whole in (
        (calibrate, 10, 30),
        (("select", *attack, "--alphas", "0.2"), 5, 10),
        (("evaluate", *attack, "--alpha", "0.2"), 5, 10),
    ):
        done = run(*command, "--dry-run")
        assert done.exit_code == 0, done.output
        assert re.search(rf"dry run: \d+\.\d\d s for {count} images, so about \d:\d\d:\d\d for {whole}\n", done.stdout)
    assert {*tmp_path.iterdir()} == before
    assert left == [None, None], "calibrate and evaluate joined the others under torchrun"


def test_assumed_sizes_are_printed(tmp_path, model, data, statistics):
    assert "assumed: images 1x28x28 (--input-shape" in run("inspect", "bundled").stderr
    done = run("export", model, "--statistics", statistics, "--alpha", 0.2, "--out", tmp_path / "a.pt2")
    assert done.exit_code == 0, done.output
    assert "images 1x8x8, as in calibration" in done.stderr
    assert "images: data.npz" in run("calibrate", model, "--data", data, "--out", tmp_path / "s").stderr


ATTACK = ("--steps", 1, "--attacks", "apgd-ce/exact", "--eps", 0.05)


@pytest.fixture
def chosen(tmp_path, model, data):
    """From calibrate and select, by settings alone."""
    own, out = tmp_path / "own.safetensors", tmp_path / "chosen.safetensors"
    done = run("calibrate", model, "--data", data, "--out", own, "--limit", 10)
    assert done.exit_code == 0, done.output
    done = run(
        "select",
        model,
        "--data",
        data,
        "--settings",
        own,
        "--alphas",
        "0.2",
        "--skip",
        10,
        "--limit",
        15,
        *ATTACK,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    assert (
        "nothing to compare. To compare what looked best: --alpha 0.2 (with --settings also --alpha leader)"
        in " ".join(done.stdout.split())
    )
    return out


def test_settings_are_enough(tmp_path, model, data, chosen):
    evaluate = ("evaluate", model, "--data", data, "--settings", chosen, *ATTACK)
    done = run(*evaluate, "--skip", 10)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert "Nothing compared: alpha is 0, so the model is its base." in printed
    assert "To compare what looked best: --alpha 0.2" in printed
    done = run(*evaluate, "--skip", 10, "--alpha", "leader", "--eps", 0.1, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["alpha"] == 0.2
    checks = {check["name"]: check["finding"] for check in report["checks"]}
    assert checks["threat of the choice"].startswith(
        "alpha was looked for under Linf eps 0.05, and this is Linf eps 0.1"
    )
    assert re.match(r"[1-9]\d* of 20 images were used to choose alpha:", checks["unseen images"])
    done = run("export", model, "--settings", chosen, "--out", tmp_path / "a.pt2")
    assert done.exit_code == 0, done.output
    assert "images 1x8x8, as in calibration" in done.stderr
    assert done.stdout.startswith("export, alpha 0, the base itself, ")
    lines = run("show", chosen).stdout.splitlines()
    assert lines[-9:-7] == ["alpha: 0.0", "variant: mean"]
    assert lines[-2:] == ["fuse: activation", "chosen by select: alpha 0.0; what looked best: 0.2"]
    sparse = msfx.load(chosen, load_model(model), torch.rand(2, 1, 8, 8))
    added(sparse).choice = {**added(sparse).choice, "leader": 0.0}
    msfx.save(sparse, tmp_path / "s")
    done = run("evaluate", model, "--data", data, "--settings", tmp_path / "s", "--alpha", "leader")
    check_error(done, "gave up every alpha but 0", "--alpha a number")
    check_error(run(*evaluate, "--include", "relu"), "leave --placement, --include")
    check_error(
        run("evaluate", "bundled", "--data", data, "--settings", chosen), "another model", "first differing site"
    )


def test_card(tmp_path, model, data, chosen, monkeypatch):
    sparse = msfx.load(chosen, load_model(model), torch.rand(2, 1, 8, 8))
    msfx.set_alpha(sparse, 0.2)
    msfx.save(sparse, tmp_path / "s")
    report = tmp_path / "out" / "report.json"
    done = run("evaluate", model, "--data", data, "--settings", tmp_path / "s", *ATTACK, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for spec in ((), (model,)):
        done = run("card", *spec, "--settings", tmp_path / "s", "--report", report, "--out", tmp_path / "hub")
        assert done.exit_code == 0, done.output
        monkeypatch.chdir(tmp_path / "hub")
        block = Path("README.md").read_text().split("```")[1].removeprefix("python")
        given = load_model(model)
        if spec:  # whose weights the folder has
            for value in given.parameters():
                torch.nn.init.normal_(value)
        names = {"model": given, "images": torch.rand(2, 1, 8, 8)}
        exec(block, names)
        state = load_file("model.safetensors")
        assert all(torch.equal(value, names["sparse"].state_dict()[key]) for key, value in state.items())
    assert state.keys() == names["sparse"].state_dict().keys()
    text, found = (tmp_path / "hub" / "README.md").read_text(), json.loads(report.read_text())
    assert f"| clean | {100 * found['base']['clean']:.1f} | {100 * found['sparse']['clean']:.1f} |" in text
    assert f"{100 * found['gain']['low']:+.1f}, {100 * found['gain']['high']:+.1f}] |" in text
    assert found["verdict"] in text
    assert text.startswith("---\nlibrary_name: meansparse_fx\n")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["sites"][0]["alpha"] == 0.2
    hub = ("--report", report, "--out", tmp_path / "hub")
    check_error(run("card", "--settings", chosen, *hub), "evaluated at alpha 0.2 at 2, where", "has 0.0")
    # Alpha as it was typed is in the settings beside the report.
    done = run("evaluate", model, "--data", data, "--settings", chosen, "--alpha", 0.3, *ATTACK, "--out", report.parent)
    assert done.exit_code == 0, done.output
    assert run("card", *hub).exit_code == 0
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["sites"][0]["alpha"] == 0.3
    (report.parent / "settings.msfx.safetensors").unlink()
    check_error(run("card", *hub), "no settings")
    assert run("evaluate", model, "--data", data, "--settings", chosen, *ATTACK, "--out", report.parent).exit_code == 0
    assert run("card", *hub).exit_code == 0
    assert " test images, not attacked; " in Path("README.md").read_text()


def test_alpha_as_it_is_typed(tmp_path, model, data, statistics):
    evaluate = ("evaluate", model, "--data", data, "--statistics", statistics, *ATTACK, "--out", tmp_path / "out")

    def alpha(text):
        (tmp_path / "a.json").write_text(text)
        return run(*evaluate, "--alpha", tmp_path / "a.json")

    for text in ('{"alpha": 0.3, "variant": "edge", "clean_budget": 0.003, "rows": []}', '{"alpha": {"[0-9]": 0.3}}'):
        done = alpha(text)
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "out" / "report.json").read_text())["alpha"] == 0.3
    check_error(alpha('{"alpha": {"layer": 0.3}}'), "no such site: layer")
    check_error(alpha('{"alpha": "much"}'), "JSON such as")
    check_error(run(*evaluate, "--alpha", tmp_path / "b.json"), "b.json: no such file, and no number")
    check_error(run(*evaluate, "--alpha", "leader"), "no leader")
    check_error(run(*evaluate), "no alpha: give --alpha")
    check_error(run(*evaluate[:4], "--alpha", 0.1), "no statistics: give --statistics")


def test_alpha_of_a_file_or_of_a_search_brings_its_variant(net, images, tmp_path):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_variant(sparse, centre="zero")
    (tmp_path / "a.json").write_text('{"alpha": 0.3, "variant": "edge"}')
    put_alpha(sparse, str(tmp_path / "a.json"))
    assert ({o.variant for o in msfx.operators(sparse).values()}, msfx.get_alpha(sparse)) == ({"edge"}, 0.3)
    added(sparse).choice = {"leader": 0.2, "variant": "smooth"}
    put_alpha(sparse, "leader")
    assert ({o.variant for o in msfx.operators(sparse).values()}, msfx.get_alpha(sparse)) == ({"smooth"}, 0.2)
    assert {o.centre_mode for o in msfx.operators(sparse).values()} == {"zero"}, "the search had it, too"


def test_adversarial_images_that_are_none_are_an_exit_status(tmp_path, model, data, statistics):
    given, path = (model, "--statistics", statistics), tmp_path / "e"
    done = run("evaluate", *given, "--data", data, "--skip", 20, "--alpha", 0.2, *ATTACK, "--save-adversarial", path)
    assert done.exit_code == 0, done.output
    assert run("verify", path, *given).exit_code == 0
    kept = Evidence.load(path)
    net = load_model(model)
    adversarial = {which: kept.images.clone() for which in kept.adversarial}
    broken_by = {which: torch.ones(10, dtype=torch.long) for which in kept.broken_by}
    replace(kept, labels=net(kept.images).argmax(1), adversarial=adversarial, broken_by=broken_by).save(path)
    done = run("verify", path, *given)
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)


def test_some_sites(tmp_path):
    inspect = ("inspect", "torchvision:resnet18", "--input-shape", "3,32,32")
    done = run(*inspect, "--include", r"layer[12]\.", "--include", "layer3", "--exclude", "relu_1$")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("relu", "layer"))]
    taken = [row[0] for row in rows if row[-1] == "rewritten"]
    assert taken == [f"layer{i}.{j}.relu" for i in (1, 2, 3) for j in (0, 1)]


def test_labels_beyond_the_models_classes(tmp_path, model):
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    check_error(run("calibrate", model, "--data", tmp_path / "b.npz", "--out", tmp_path / "s"), "label 3", "3 classes")


def test_statistics_of_another_model(data, statistics):
    check_error(run("evaluate", "bundled", "--data", data, "--statistics", statistics, "--alpha", 0.2))


def test_wrong_commands_are_refused_without_torch(tmp_path, data, statistics):
    wrong = [
        ("inspect", "resnet50"),
        ("inspect", "none.py:net"),
        ("inspect", "bundled", "--placement", "sums"),
        ("calibrate", "bundled", "--data", str(tmp_path / "none"), "--out", "s"),
        ("calibrate", "bundled", "--weights", "none.pt", "--data", data, "--out", "s"),
        ("select", "bundled", "--data", data, "--statistics", str(statistics), "--attacks", "apgd"),
        ("evaluate", "bundled", "--data", data, "--statistics", str(statistics), "--alpha", "0.2", "--norm", "L7"),
        ("export", "bundled", "--statistics", str(statistics), "--alpha", "0.2", "--out", "a.onnx", "--format", "tf"),
        *((command.__name__, "--help") for command in COMMANDS),
    ]
    code = f"""
import sys
from typer.testing import CliRunner
from meansparse_fx.cli import app
print([CliRunner().invoke(app, c).exit_code for c in {wrong}], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * 8 + [0] * len(COMMANDS)} False"


def test_names_are_those_of_the_tables():
    assert names.ATTACKS == attacks.ATTACKS
    assert tuple(attacks.VERSIONS) == names.VERSIONS
    assert names.SURROGATES == surrogates.SURROGATES
    assert names.VARIANTS == reference.VARIANTS
    assert tuple(sites.PLACEMENTS) == names.PLACEMENTS
    assert {*names.FORMATS} == {*export._WRITERS}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--eps", "-1"),
        ("--eps", "8/0"),
        ("--eps", "nan"),
        ("--alphas", "0.1,inf"),
        ("--attacks", "apgd"),
        ("--backwards", "straight"),
        ("--normalise", "0.5"),
        ("--normalise", "0.5/0"),
        ("--steps", "0"),
        ("--clean-budget", "x"),
    ],
)
def test_bad_options_are_usage_errors(model, data, statistics, option, value):
    done = run("select", model, "--data", data, "--statistics", statistics, option, value)
    assert done.exit_code == 2
    assert option in done.stderr


def test_bugs_keep_their_traceback(model):
    done = run("inspect", model.replace(":net", ":bug"))
    assert isinstance(done.exception, ZeroDivisionError)


def test_gray_images_of_a_folder_for_a_model_of_one_channel(tmp_path, model):
    random = np.random.default_rng(0)
    for colour, place in ((False, "gray"), (True, "colour")):
        for i in range(6):
            pixels = random.integers(0, 256, (8, 8, 3) if colour else (8, 8), np.uint8)
            (tmp_path / place / str(i % 3)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / place / str(i % 3) / f"{i}.png")
    done = run("calibrate", model, "--data", tmp_path / "gray", "--out", tmp_path / "s")
    assert done.exit_code == 0, done.output
    assert "images are gray, as one channel" in done.output
    images = load_images(tmp_path / "gray").gray()
    assert images[0][0].shape == (1, 8, 8)
    assert torch.equal(images[0][0].expand(3, 8, 8), load_images(tmp_path / "gray")[0][0])
    colour = ("calibrate", model, "--data", tmp_path / "colour", "--out", tmp_path / "t")
    check_error(run(*colour), "in colour, where the model takes one channel")
