"""The paper's tables in small: what is measured, the page made of it, and training by recipe."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from benchmarks import choice
from benchmarks.harness import read, write
from benchmarks.paper.measure import Row
from benchmarks.paper.page import write_page
from benchmarks.paper.published import PUBLISHED, change
from benchmarks.paper.tables import NETWORKS, TABLES
from benchmarks.paper.training import ACTIVATIONS, Recipe, pgd, train
from benchmarks.train_robust import subsets

ROOT = Path(__file__).parents[1]
COUNTS = {"selection_images": 10, "images": 10, "attacked": 10}


def test_tables_are_those_of_the_paper():
    assert list(TABLES) == list(range(1, 13)) == list(PUBLISHED)
    for number, table in TABLES.items():
        keys = Counter((cell.column, cell.row) for cell in table.cells)
        assert max(keys.values()) == 1, f"table {number} measures something twice"
        cells = {(cell.column, cell.row): cell for cell in table.cells}
        for column, rows in PUBLISHED[number].items():
            for row in rows:
                assert (column, row) in cells, f"table {number}: the paper's {column}, {row} stands beside nothing"
        for cell in table.cells:
            assert cell.network in NETWORKS
            # Two cells of one threat and network share the base's attacks: one of them is the base.
            assert any((c.alpha == 0 and c.column == cell.column) or c.column == "base" for c in table.cells)


def test_the_papers_changes():
    assert change(2, "GELU", "0.2") == pytest.approx(0.0125)
    assert change(7, "alpha 0.35", "0.02") == pytest.approx(0.0966)
    assert change(9, "alpha 0.2", "0.025") == pytest.approx(-0.0012)
    assert change(1, "GELU, test", "0.1") is None
    assert change(12, "GELU", "0.2") is None


def a_row(number: int, cell, **given) -> Row:
    return Row(
        **dict(
            table=number,
            row=cell.row,
            column=cell.column,
            alpha=cell.alpha,
            network=cell.network,
            sites="0",
            centre=cell.centre,
            split=cell.split,
            attacks="apgd-ce",
            norm="Linf",
            eps=0.1,
            steps=3,
            images=100,
            clean=0.8,
            attacked=50,
            own=0.5,
            own_change=0.02,
            own_low=0.01,
            own_high=0.03,
            worst=0.4,
            worst_change=-0.01,
            worst_low=-0.02,
            worst_high=0.0,
            torch="2",
        )
        | given
    )


def test_the_page_says_what_the_files_say(tmp_path):
    rows = [a_row(11, cell) for cell in TABLES[11].cells]
    write([a_row(3, cell) for cell in TABLES[3].only(["L2"]).cells], tmp_path / "paper-3.csv")
    rows[1] = replace(rows[1], worst_change=0.04, worst_low=0.03, worst_high=0.05)
    write(rows, tmp_path / "paper-11.csv")
    assert read(tmp_path / "paper-11.csv", Row) == rows
    write_page(tmp_path, tmp_path)
    page = (tmp_path / "paper.md").read_text()
    assert "| 11: Main path, and after the addition | 8 | 8 (8) | 0 (0) | 1 (1) | 7 (0) | 8 | 0 |" in page
    assert "has the paper's sign in 8 of 8 settings" in page
    assert "has the paper's sign in 1 of 8 settings" in page
    assert "|  | 0.2 | 80.0 | 50.0 | +2.0 [+1.0, +3.0] | 40.0 | -1.0 [-2.0, +0.0] | +0.5 |" in page
    assert "Not measured yet: `python -m benchmarks.paper 2`" in page
    assert "Not measured yet: Linf." in page
    assert "Not measured yet against" not in page
    assert (tmp_path / "paper-11.png").stat().st_size > 10_000


def test_the_page_says_what_no_attacker_who_knows_has_seen(tmp_path):
    unknown = {"worst": None, "worst_change": None, "worst_low": None, "worst_high": None}
    write([a_row(11, cell, **unknown) for cell in TABLES[11].cells], tmp_path / "paper-11.csv")
    write([a_row(4, cell, attacks="square", **unknown) for cell in TABLES[4].cells], tmp_path / "paper-4.csv")
    write_page(tmp_path, tmp_path)
    page = (tmp_path / "paper.md").read_text()
    assert page.count("Not measured yet against attackers who know") == 1
    assert "know the operator: main path, after addition." in page
    assert "| 11: Main path, and after the addition | 8 | 8 (8) | 0 (0) |  |  | 8 | 0 |" in page


def test_the_page_says_what_choosing_bought(tmp_path):
    numbers = {f.name: 0.0 for f in fields(choice.Row) if f.type == "float"}
    base = choice.Row(**numbers | {"search": "base", "setting": "alpha 0", "chosen": True, "torch": "2"}, **COUNTS)
    won = replace(base, search="one alpha", setting="mean, alpha 0.2", worst=0.75, worst_change=0.02, worst_low=0.01)
    lost = replace(won, search="by site", chosen=False, worst_low=-0.01)
    write([base, won, lost], tmp_path / "choice.csv")
    write_page(tmp_path, tmp_path)
    page = (tmp_path / "paper.md").read_text()
    assert "Of 2 searches 1 chose something beyond noise, and 1 of these are better" in page
    assert "| one alpha | mean, alpha 0.2 | yes |" in page
    assert "| by site | mean, alpha 0.2 | no, it looked best |" in page


def test_some_columns_of_a_table(tmp_path):
    assert {cell.column for cell in TABLES[2].only(["ReLU", "ELU"]).cells} == {"ReLU", "ELU"}
    with pytest.raises(ValueError, match="no column Relu: there are GELU, ReLU"):
        TABLES[2].only(["Relu"])
    path = tmp_path / "rows.csv"
    path.write_text("kept")
    with pytest.raises(IndexError):
        write([], path)
    assert path.read_text() == "kept"


def test_the_committed_page_is_made_from_the_committed_files(tmp_path):
    write_page(ROOT / "benchmarks/results", tmp_path)
    assert (tmp_path / "paper.md").read_text() == (ROOT / "docs/paper.md").read_text()


def test_image_sets_are_disjoint():
    found = subsets(60_000, 10_000)
    of_test = [i for name, index in found.items() if name != "calibration" for i in index.tolist()]
    assert len(set(of_test)) == len(of_test) == 6000


@pytest.mark.parametrize("method", ["pgd", "trades", "standard"])
def test_training_learns(method):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (96,), generator=generator)
    images = 0.2 * torch.rand(96, 1, 28, 28, generator=generator) + 0.6 * labels.view(-1, 1, 1, 1)
    recipe = Recipe(method=method, epochs=3, steps=2, batch_size=16, compile=False)
    model = train(recipe, images, labels)
    assert not model.training
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).double().mean()) > 0.9
    assert recipe.digest != replace(recipe, seed=1).digest


def test_attacks_of_training_stay_in_their_ball():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(5, 1, 2, 2)
    found = pgd(model, x, torch.zeros(5, dtype=torch.long), 0.1, 3, 0.05)
    assert float((found - x).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_a_site_with_a_kernel(name):
    torch.manual_seed(0)
    act = ACTIVATIONS[name]()
    with torch.no_grad():
        for parameter in act.parameters():
            parameter.add_(0.2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), act).eval().requires_grad_(False)
    x = torch.rand(2, 1, 8, 8)
    sparse = msfx.transform(net, x)
    assert [(s.activation.name, s.activation.fused) for s in sparse.meta["plan"]] == [(name, True)]
    torch.testing.assert_close(sparse(x), net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_table_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.paper", "11", "--bundled", "--attacked", "40", "--steps", "3"]
    command += ["--cache", tmp_path / "cache", "--out", tmp_path]
    printed = []
    for _ in range(2):  # the second time everything is on disk
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout[done.stdout.index("Table 11") :])
    assert printed[0] == printed[1]
    rows = read(tmp_path / "paper-11.csv", Row)
    assert [(row.column, row.row) for row in rows] == [(cell.column, cell.row) for cell in TABLES[11].cells]
    assert {row.attacked for row in rows} == {40}
    for row in rows:
        assert row.worst is not None
        assert row.worst <= row.own <= 1
        if row.alpha == 0:
            assert row.own_change == row.worst_change == 0
