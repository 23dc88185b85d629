"""What README and docs show runs as it stands: each page's Python from top to bottom, each command up to its model."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.cli import app
from tests.test_published import Published, Tokens, build, nothing

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "<!-- not run: "  # before a block, with the reason


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in their order, without those that say why they are not run."""
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [m[2] for m in found if m[1] == language and not _line_before(text, m.start()).startswith(NOT_RUN)]


def _line_before(text: str, position: int) -> str:
    lines = text[:position].rstrip().splitlines()
    return lines[-1] if lines else ""


def _quick(verb):
    few = {"steps": 2, "queries": 5, "sanity_images": 0}
    taken = few.keys() & inspect.signature(verb).parameters.keys()
    return lambda *args, **kwargs: verb(*args, **kwargs | {name: few[name] for name in taken})


def a_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


def names_of_the_reader() -> dict[str, object]:
    """Return what a reader is taken to have: a model, images, and loaders of them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 8, 8, generator=generator)
    torch.manual_seed(0)
    model = a_model()
    labels = model(images).argmax(1)  # others would be remarked on
    names = {}
    for name in ("loader", "held_out", "test"):  # images that no other verb saw
        own = torch.rand(24, 3, 8, 8, generator=generator)
        names[name] = list(zip(own.split(8), model(own).argmax(1).split(8), strict=True))
    models = {"model": model, "base": build(Tokens, nothing).float()}
    checkpoint = build(Tokens, Published).float().state_dict()
    return {"msfx": msfx, "torch": torch, "images": images, "labels": labels, "checkpoint": checkpoint} | names | models


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = bundled.load_split
    monkeypatch.setattr(bundled, "load_split", lambda name: tuple(part[:16] for part in whole(name)))
    for verb in ("evaluate", "select_alpha"):  # as they are called, but for how long they look
        monkeypatch.setattr(msfx, verb, _quick(getattr(msfx, verb)))
    names = names_of_the_reader()
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
        assert bool(capsys.readouterr().out.strip()) or "print(" not in block


COMMANDS = [
    (page.name, line.strip())
    for page in PAGES
    for language in ("", "sh", "bash", "console")
    for block in blocks(page, language)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith("meansparse-fx ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_options_of_commands_exist(page, line):
    _, name, *arguments = shlex.split(line, comments=True)
    known = {option for parameter in typer.main.get_command(app).commands[name].params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_there_is_something_to_run():
    assert len(COMMANDS) > 5
    assert PYTHON[0].name == "README.md"


def test_a_block_that_is_not_run_says_why():
    for page in PAGES:
        for line in page.read_text().splitlines():
            assert not line.startswith(NOT_RUN) or len(line) > len(NOT_RUN) + 20


@pytest.mark.slow
def test_the_api_reference_has_every_public_name(tmp_path):
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("meansparse_fx", output_directory=tmp_path)
    page = (tmp_path / "meansparse_fx.html").read_text()
    assert [name for name in msfx.__all__ if f'id="{name}"' not in page] == []
