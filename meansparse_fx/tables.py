"""Floor 1: printed tables, the same as LaTeX and HTML, and CSV. Imports rich only."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from html import escape
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}


class Tabled:
    """What prints, and shows in a notebook, as its table, as wide as the terminal, and gives it to LaTeX."""

    __slots__ = ()

    def table(self) -> Table:
        """Return the table."""
        raise NotImplementedError

    def to_latex(self) -> str:
        """Return `table` as a tabular of the LaTeX package booktabs."""
        return as_latex(self.table())

    def __repr__(self) -> str:
        return as_text(self.table())


class FittingTable(Table):
    """A table that leaves out columns, the last ``optional`` ones first, rather than break words; it says which."""

    optional: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = copy(self)
        dropped: list[str] = []
        shown.columns = list(self.columns)
        for name in reversed(self.optional):
            if shown._narrowest(console, options.update(max_width=10_000)) <= options.max_width:
                break
            kept = [column for column in shown.columns if column.header != name]
            shown.columns = [replace(column, _index=i) for i, column in enumerate(kept)]  # the last has no padding
            dropped.insert(0, name.replace("/\n", "/"))
        if dropped:
            left_out = f"left out, too wide: {', '.join(dropped)}"
            shown.caption = f"{self.caption}\n{left_out}" if self.caption else left_out
        yield from Table.__rich_console__(shown, console, options)

    def _narrowest(self, console: Console, options: ConsoleOptions) -> int:
        """Return the width without a broken word, nor a broken line where a column has whole ones."""
        whole = (self._measure_column(console, options, column) for column in self.columns if column.no_wrap)
        return self.__rich_measure__(console, options).minimum + sum(w.maximum - w.minimum for w in whole)


def new_table(
    *columns: str,
    left: Sequence[str] = (),
    optional: Sequence[str] = (),
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """Return a table without rows. Its first column holds names, which are never broken: the others give way.

    Args:
        columns: Headers, all but the first and those in ``left`` aligned to the right; ``apgd-ce/exact`` has two lines.
        optional: Those to leave out where there is no room.
    """
    table = FittingTable(
        title=title, caption=caption, title_justify="left", caption_justify="left", show_edge=False, pad_edge=False
    )
    table.optional = [column.replace("/", "/\n") for column in optional]
    for i, column in enumerate(columns):
        side = "left" if i == 0 or column in left else "right"
        table.add_column(column.replace("/", "/\n"), justify=side, no_wrap=i == 0, overflow="fold")  # type: ignore[arg-type]
    return table


def as_text(table: Table, width: int | None = None) -> str:
    """Return what ``table`` looks like, without trailing blanks, in the terminal's width or ``width`` columns."""
    out = io.StringIO()
    Console(file=out, width=width or terminal_width()).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def terminal_width() -> int:
    """Return the columns of the terminal, or of COLUMNS; 120 without either."""
    return shutil.get_terminal_size((120, 24)).columns


def as_latex(table: Table) -> str:
    """Return ``table`` as a tabular of the LaTeX package booktabs, title and caption in comments."""
    words = [*(table.title or "").splitlines(), *(table.caption or "").splitlines()]  # type: ignore[union-attr]
    heads, *rows = (rf"{' & '.join(map(_in_latex, row))} \\" for row in _texts(table))
    sides = "".join((column.justify or "left")[0] for column in table.columns)
    return "\n".join(
        [
            *(f"% {line}" for line in [r"\usepackage{booktabs}", *words]),
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            heads,
            r"\midrule",
            *rows,
            r"\bottomrule",
            "\\end{tabular}\n",
        ]
    )


def as_html(table: Table) -> str:
    """Return ``table`` as the rows of an HTML table, numbers of class ``number`` and bold rows of class ``strong``."""
    sides = [' class="number"' if column.justify == "right" else "" for column in table.columns]
    heads, *rows = (list(map(escape, row)) for row in _texts(table))
    found = ["<tr>", *(f"<th{side}>{head}</th>" for side, head in zip(sides, heads, strict=True)), "</tr>"]
    for texts, row in zip(rows, table.rows, strict=True):
        found.append('<tr class="strong">' if row.style == "bold" else "<tr>")
        found += [f"<td{side}>{text}</td>" for side, text in zip(sides, texts, strict=True)]
        found.append("</tr>")
    return "\n".join(found)


def _texts(table: Table) -> Iterator[tuple[str, ...]]:
    """Yield the headers of a table, without line breaks, and its rows."""
    yield tuple(re.sub(r"(?<=[/-])\n", "", str(column.header)).replace("\n", " ") for column in table.columns)
    yield from zip(*(map(str, column.cells) for column in table.columns), strict=True)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV with a header; numbers in full."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _in_latex(text: str) -> str:
    """Return text as LaTeX shows it, with a minus before negative numbers."""
    escaped = "".join(_LATEX.get(c, c) for c in text)
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", escaped)
