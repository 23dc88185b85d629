"""The paper's tables in small: what is measured, the page made of it, and training by recipe."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import meansparse_fx as msfx
from benchmarks.harness import COLUMNS, Row, read, write
from benchmarks.page.__main__ import paper_page
from benchmarks.page.paper import PUBLISHED, change, drawn, figure_of
from benchmarks.page.results import Results
from benchmarks.paper import __main__ as program
from benchmarks.paper.tables import NETWORKS, TABLES
from benchmarks.paper.training import ACTIVATIONS, Recipe, pgd, subsets, train

ROOT = Path(__file__).parents[1]
COUNTS = {"selection_images": 10, "images": 10, "attacked": 10}


def test_tables_are_those_of_the_paper():
    assert list(TABLES) == list(range(1, 13))
    for number, table in TABLES.items():
        keys = Counter((cell.column, cell.row) for cell in table.cells)
        assert max(keys.values()) == 1, f"table {number} measures something twice"
        cells = {(cell.column, cell.row): cell for cell in table.cells}
        published = [(column, row) for table, column, row in PUBLISHED if table == number]
        assert published or number == 12
        for column, row in published:
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
    known = {"table": number, "row": cell.row, "column": cell.column, "alpha": cell.alpha, "network": cell.network}
    known |= {"sites": "0", "centre": cell.centre, "split": cell.split, "attacks": "apgd-ce", "norm": "Linf"}
    known |= {"eps": 0.1, "steps": 3, "images": 100, "clean": 0.8, "attacked": 50, "torch": "2"}
    known |= {"own": 0.5, "own_change": 0.02, "own_low": 0.01, "own_high": 0.03}
    known |= {"worst": 0.4, "worst_change": -0.01, "worst_low": -0.02, "worst_high": 0.0}
    return Row(**known | given)


def test_the_page_says_what_the_files_say(tmp_path):
    rows = [a_row(11, cell) for cell in TABLES[11].cells]
    write([a_row(3, cell) for cell in TABLES[3].cells if cell.column == "L2"], tmp_path / "paper-3.csv")
    rows[1] = rows[1].but(worst_change=0.04, worst_low=0.03, worst_high=0.05)
    write(rows, tmp_path / "paper-11.csv")
    assert read(tmp_path / "paper-11.csv") == rows
    results = Results(tmp_path)
    page = paper_page(results)
    assert "| 11: Main path, and after the addition | 8 | 8 (8) | 0 (0) | 1 (1) | 7 (0) | 8 | 0 |" in page
    assert "has the paper's sign in 8 of 8 settings" in page
    assert "has the paper's sign in 1 of 8 settings" in page
    assert "|  | 0.2 | 80.0 | 50.0 | +2.0 [+1.0, +3.0] | 40.0 | -1.0 [-2.0, +0.0] | +0.5 |" in page
    assert "Not measured yet: `python -m benchmarks.paper 2`" in page
    assert "Not measured yet: Linf." in page
    assert "Not measured yet against" not in page
    assert list(drawn(results)) == [3, 11]
    figure = figure_of(11, rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["main path", "after addition"]
    assert {len(axes.lines) for axes in figure.axes} == {4}  # nought, the paper, own gradient, those who know


def test_the_page_says_what_no_attacker_who_knows_has_seen(tmp_path):
    unknown = {"worst": None, "worst_change": None, "worst_low": None, "worst_high": None}
    write([a_row(11, cell, **unknown) for cell in TABLES[11].cells], tmp_path / "paper-11.csv")
    write([a_row(4, cell, attacks="square", **unknown) for cell in TABLES[4].cells], tmp_path / "paper-4.csv")
    page = paper_page(Results(tmp_path))
    assert page.count("Not measured yet against attackers who know") == 1
    assert "know the operator: main path, after addition." in page
    assert "| 11: Main path, and after the addition | 8 | 8 (8) | 0 (0) |  |  | 8 | 0 |" in page


def test_the_page_says_what_choosing_bought(tmp_path):
    which = ("selection", "own", "worst")
    numbers = {f"{name}{end}": 0.0 for name in which for end in ("", "_change", "_low", "_high")}
    numbers = {name: value for name, value in numbers.items() if name in COLUMNS} | {"clean": 0.0, "clean_change": 0.0}
    base = Row(search="base", setting="alpha 0", chosen=True, torch="2", **numbers, **COUNTS)
    won = base.but(search="one alpha", setting="mean, alpha 0.2", worst=0.75, worst_change=0.02, worst_low=0.01)
    lost = won.but(search="by site", chosen=False, worst_low=-0.01)
    write([base, won, lost], tmp_path / "choice.csv")
    page = paper_page(Results(tmp_path))
    assert "Of 2 searches 1 chose something beyond noise, and 1 of these are better" in page
    assert "| one alpha | mean, alpha 0.2 | yes |" in page
    assert "| by site | mean, alpha 0.2 | no, it looked best |" in page


def test_some_columns_of_a_table(tmp_path, monkeypatch, capsys):
    cells = {column: [row.row for row in TABLES[2].cells if row.column == column] for column in TABLES[2].columns}
    write([a_row(2, cell) for cell in TABLES[2].cells if cell.column != "ELU"], tmp_path / "paper-2.csv")
    measured = lambda _, number, column: [a_row(number, c) for c in TABLES[number].cells if c.column == column]  # noqa: E731
    monkeypatch.setattr(program.Laboratory, "rows", measured)
    arguments = ["paper", "2", "--out", str(tmp_path), "--cache", str(tmp_path), "--column"]
    monkeypatch.setattr(sys, "argv", [*arguments, "ELU"])
    program.main()
    rows = read(tmp_path / "paper-2.csv")
    assert [(row.column, row.row) for row in rows if row.column == "ELU"] == [("ELU", name) for name in cells["ELU"]]
    assert len(rows) == len(TABLES[2].cells)
    monkeypatch.setattr(sys, "argv", [*arguments, "Relu"])
    with pytest.raises(SystemExit):
        program.main()
    assert "table 2: no column Relu: there are GELU, ReLU" in capsys.readouterr().err


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
    found = []
    for _ in range(2):  # the second time everything is on disk
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(read(tmp_path / "paper-11.csv"))
    assert found[0] == found[1]
    rows = found[0]
    assert [(row.column, row.row) for row in rows] == [(cell.column, cell.row) for cell in TABLES[11].cells]
    assert {row.attacked for row in rows} == {40}
    for row in rows:
        assert row.worst is not None
        assert row.worst <= row.own <= 1
        if row.alpha == 0:
            assert row.own_change == row.worst_change == 0
