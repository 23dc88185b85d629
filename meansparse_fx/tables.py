"""Floor 1: a rich table as plain text, for printing a result. Imports rich only."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def as_text(table: Table, width: int) -> str:
    """Return what ``table`` looks like on a console ``width`` columns wide, without trailing blanks."""
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
