"""Printed tables: they fit the terminal, and no name is broken."""

from __future__ import annotations

import pytest

import meansparse_fx as msfx
from meansparse_fx.tables import as_html, as_latex, as_text, new_table

NAME = "stages.2.blocks.11.mlp.activation"


def table():
    found = new_table(
        "site", "apgd-ce/exact", "apgd-t/annealed", "status", left=("status",), optional=("apgd-t/annealed",)
    )
    found.add_row(NAME, "-0.2 [-0.6, +0.2]", "50", "skipped: squeeze-and-excitation, pooled and multiplied")
    return found


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_stay_whole_and_lines_fit(width):
    lines = as_text(table(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith(NAME) for line in lines)


def test_numbers_stay_whole_where_columns_are_left_out():
    """Rich tells the last column, which has no padding, by an index that is another once columns are gone."""
    names = ("apgd-ce/identity", "apgd-margin/annealed")
    found = new_table("alpha", "worst\ncase", *names, "against base", "", optional=names)
    found.columns[-2].no_wrap = True
    found.add_row("0.1", "(90.0)", "(90.0)", "(90.0)", "-10.0 [-21.8, -0.4]", "chosen")
    for width in range(48, 100):
        text = as_text(found, width)
        assert "(90.0)" in text
        assert "-10.0 [-21.8, -0.4]" in text
        assert max(map(len, text.splitlines())) <= width
    assert "worst case &" in as_latex(found)


def test_what_is_left_out_is_said():
    assert "left out, too wide: apgd-t/annealed" in as_text(table(), 60)
    assert "too wide" not in as_text(table(), 120)


def test_the_terminal_decides(monkeypatch, net, images):
    sparse = msfx.transform(net, images)
    statistics = msfx.calibrate(sparse, [images], progress=False)
    for columns in (70, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        for shown in (statistics, sparse.meta["plan"]):
            lines = str(shown).splitlines()
            assert repr(shown) == str(shown)  # as a notebook shows it
            assert max(map(len, lines)) <= columns
            assert all(any(line.startswith(name) for line in lines) for name in statistics)


def test_latex_shows_what_the_table_shows():
    found = new_table("row", "50 %", caption="below")
    found.add_row("a_b & {c}", "-0.1 to 2\\")
    assert as_latex(found).splitlines() == [
        r"% \usepackage{booktabs}",
        "% below",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"row & 50 \% \\",
        r"\midrule",
        r"a\_b \& \{c\} & $-$0.1 to 2\textbackslash{} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_html_shows_what_the_table_shows():
    found = new_table("row", "apgd-ce/exact")
    found.add_row("a <b> & c", "-0.1", style="bold")
    assert as_html(found).splitlines() == [
        "<tr>",
        "<th>row</th>",
        '<th class="number">apgd-ce/exact</th>',
        "</tr>",
        '<tr class="strong">',
        "<td>a &lt;b&gt; &amp; c</td>",
        '<td class="number">-0.1</td>',
        "</tr>",
    ]
