"""What lies in the folder of results, by benchmark and file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..calibration import Need
from ..harness import Row, read
from ..roofline import Count
from ..scaling import Scaling

# Commits whose rows of the operator's own kernels were measured before those kernels were replaced.
REPLACED = {"19197a7": "2026-11-26"}


def mark(row: Row) -> str:
    """Return † behind a figure of a kernel that has been replaced since: of ours run eagerly; moments are as they were.

    Example:
        >>> mark(Row("models", "c", "ours", 1.0, 1.0, 1.0, 1.0, "base", 1, "d", "t", 1, commit="19197a7"))
        '†'
    """
    own = row.contender.startswith(("ours", "meansparse_fx", "operator", "module")) or "operator" in row.case
    other = row.benchmark == "calibration" or "compiled" in row.contender or "reduce-overhead" in row.contender
    return "†" if row.commit in REPLACED and own and not other and " moments" not in row.case else ""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of results: its name, and its rows, in its order; never empty."""

    name: str
    rows: Sequence[Any]

    @property
    def gpu(self) -> bool:
        """Whether it is from a GPU: files from a CPU say so in their names, as benchmarks/README.md asks."""
        return "-cpu-" not in self.name

    @property
    def where(self) -> str:
        """The machine in words."""
        row = self.rows[0]
        threads = "" if self.gpu else f", {row.threads} thread{'s' * (row.threads > 1)}"
        triton = f", Triton {row.triton}" if getattr(row, "triton", None) else ""
        when = f", commit {row.commit}, {row.date}" if getattr(row, "commit", None) else ""
        return f"{row.device}{threads}, torch {row.torch}{triton}{when}"

    @property
    def contenders(self) -> list[str]:
        """All that are in it, in its order."""
        return list(dict.fromkeys(row.contender for row in self.rows))

    @property
    def cases(self) -> dict[str, dict[str, Row]]:
        """The rows by case and contender."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, {})[row.contender] = row
        return found


MEASURED = ("models", "kernels", "calibration", "attack", "host")


@dataclass(frozen=True, slots=True)
class Results:
    """All files that the page is made from: sources by benchmark; what calibration needs; what was counted."""

    models: list[Source] = field(default_factory=list)
    kernels: list[Source] = field(default_factory=list)
    calibration: list[Source] = field(default_factory=list)
    attack: list[Source] = field(default_factory=list)
    host: list[Source] = field(default_factory=list)
    scaling: list[Source] = field(default_factory=list)
    images: list[Need] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def count(self, model: str, form: str) -> Count | None:
        """Return the count of a form in a model, if there is one."""
        return next((c for c in self.counts if (c.model, c.form) == (model, form)), None)


def load(folder: Path) -> Results:
    """Return what lies in ``folder``; what is not there is empty."""

    def sources(benchmark: str, kind: type[Any] = Row) -> list[Source]:
        paths = (path for path in sorted(folder.glob(f"{benchmark}-*.csv")) if path.name != "calibration-images.csv")
        return [Source(path.name, rows) for path in paths if (rows := read(path, kind))]

    single = (read(folder / f"{name}.csv", kind) for name, kind in (("calibration-images", Need), ("roofline", Count)))
    return Results(*map(sources, MEASURED), sources("scaling", Scaling), *single)
