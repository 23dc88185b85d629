"""Floor 1: one progress bar for everything that takes a while. Imports rich only."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(enabled: bool = True) -> Progress:
    """Return a progress display; use it as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=6),  # notes and times beside it fit 80 columns
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("|"),
        TimeRemainingColumn(),
        TextColumn("left"),
        disable=not enabled,
    )


def say_resumed(display: Progress, what: str, place: int, total: int | None) -> None:
    """Say where a run goes on that an earlier process began: ``goes on from batch 3 of 12``."""
    if not display.disable and (total is None or place <= total):
        display.console.print(f"goes on from {what} {place}" + (f" of {total}" if total else ""), highlight=False)
