"""What all pages are made with: tables in Markdown, and what is written between two marks of a page."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

END = "<!-- end -->"


def render(template: str, **given: Any) -> str:
    """Return a page made of its template in this folder, which knows what is ``given``."""
    style = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(**style, undefined=StrictUndefined)
    return environment.from_string(Path(__file__).with_name(template).read_text()).render(given)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], space: str = "") -> str:
    """Return a table, empty without rows; the first column stands left, all others are numbers and stand right.

    Args:
        heads: Of the columns.
        rows: Of cells.
        space: Around the dashes of the second line.
    """
    rows = list(rows)
    if not rows:
        return ""
    dashes = "|".join(f"{space}{'---:' if at else '---'}{space}" for at in range(len(heads)))
    lines = [f"| {' | '.join(line)} |" for line in (heads, *rows)]
    return "\n".join([lines[0], f"|{dashes}|", *lines[1:]])


def between_marks(path: Path, part: str, text: str) -> None:
    """Put a text between the marks that a part has on a page.

    Raises:
        SystemExit: The page lacks them.
    """
    start = f"<!-- {part}: made by benchmarks.page -->\n"
    before, _, rest = path.read_text().partition(start)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} lacks the marks {start.strip()} and {END}")
    path.write_text(f"{before}{start}{text.strip()}\n{END}{after}")


def points(row: Any, which: str) -> str:
    """Return a row's change of accuracy and its interval, fractions, in percentage points; empty if it has none."""
    change, low, high = (row.get(f"{which}_{end}") for end in ("change", "low", "high"))
    return "" if change is None else f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
