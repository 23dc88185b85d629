"""What the choice of alpha buys on the bundled network: one alpha for all, variants of the operator, an alpha by site.

    python -m benchmarks.choice [--out benchmarks/results/choice.csv]

Each search sees the selection images alone, and attacks the first 1,000 of them. What it chooses, or, where nothing is
better than the base beyond noise, what looked best to it, is then attacked on the 2,000 test images by `evaluate`'s
attacks (100 steps, the three nearest classes, 1,000 queries), each on what those before it left. Killed at any moment
it goes on; a few hours on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.alpha import AlphaSearch
from meansparse_fx.alpha.race import Alpha, Candidate, Field
from meansparse_fx.demo import ALPHAS, BATCH_SIZE
from meansparse_fx.evaluate import AttackSettings, ModelOutcome, PairedDifference
from meansparse_fx.evaluate.ledger import Ledger, model_identity
from meansparse_fx.evaluate.outcome import mean
from meansparse_fx.evaluate.plan import plan_runs
from meansparse_fx.progress import bar

from .harness import points, write

SITE_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)  # one site alone bears more than all together
SEARCHES: dict[str, dict[str, Any]] = {
    "one alpha": {},
    "variants": {"variants": ("edge", "smooth")},
    "by site": {"per_site": True, "site_alphas": SITE_ALPHAS},
}
STEPS = 30  # of the search; see `meansparse_fx.demo` for why not fewer
ATTACKS = ("adaptive",)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting on the test images; the fields are the CSV's columns. Accuracies are fractions.

    Attributes:
        search: Which search it comes from; ``base`` is alpha 0.
        setting: The variant and alpha.
        chosen: Better than the base beyond noise on the selection images; otherwise it looked best there.
        selection_images, selection_change, selection_low, selection_high: Change of the worst case on those attacked.
        images, clean, clean_change: Of the test images.
        attacked: How many of them.
        own, own_change, own_low, own_high: After the attacks by the operator's own gradient; 95 % interval.
        worst, worst_change, worst_low, worst_high: After all attacks.
        torch: Version.
    """

    search: str
    setting: str
    chosen: bool
    selection_images: int
    selection_change: float
    selection_low: float
    selection_high: float
    images: int
    clean: float
    clean_change: float
    attacked: int
    own: float
    own_change: float
    own_low: float
    own_high: float
    worst: float
    worst_change: float
    worst_low: float
    worst_high: float
    torch: str


def search(sparse: fx.GraphModule, name: str, cache: Path, attacked: int) -> AlphaSearch:
    """Return what one of `SEARCHES` found."""
    return msfx.select_alpha(
        sparse,
        bundled.load_split("selection"),
        alphas=ALPHAS,
        attacked=attacked,
        eps=bundled.EPS,
        steps=STEPS,
        batch_size=BATCH_SIZE,
        checkpoint=cache / f"choice-{name.replace(' ', '-')}.safetensors",
        **SEARCHES[name],
    )


def best(found: AlphaSearch) -> tuple[Candidate, ModelOutcome, bool]:
    """Return what a search chose, or what looked best to it if that is the base; its outcome; which of the two."""
    if not isinstance(found.alpha, float):
        assert found.refinement is not None
        return Candidate(found.alpha, found.variant), found.refinement.outcome, True
    if found.alpha:
        return Candidate(found.alpha, found.variant), found.outcomes[found.alpha], True
    finished = [(v, a, o) for v, a, o in found.rows() if a and len(o.worst) == len(found.base.worst)]
    variant, alpha, outcome = max(finished, key=lambda row: int(row[2].worst.sum()))
    return Candidate(alpha, variant), outcome, False


def words(alpha: Alpha, variant: str) -> str:
    """Return a setting in a few words."""
    if isinstance(alpha, float):
        return "alpha 0" if not alpha else f"{variant}, alpha {alpha:g}"
    return f"{variant}, {json.dumps({site: round(a, 3) for site, a in alpha.items()})}"


def measure(searches: Sequence[str], cache: Path, attacked: int, selection: int) -> list[Row]:
    """Return the rows: the base, then each search's best on the test images."""
    sparse = msfx.transform(bundled.load_model().requires_grad_(False), bundled.load_split("test")[0][:2])
    msfx.calibrate(sparse, bundled.load_split("calibration")[0].split(BATCH_SIZE), progress=False)
    settings = AttackSettings(bundled.EPS, steps=100, queries=1000, target_classes=3)
    runs = [run for run in plan_runs(ATTACKS, (), settings.seed) if not run.started]  # no other model to start from
    found = {name: search(sparse, name, cache, selection) for name in searches}
    images, labels = bundled.load_split("test")
    data = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    identity = model_identity(sparse, alpha=False) | {"settings": f"{settings}", "attacks": [run.name for run in runs]}
    rows = []
    with Ledger(cache / "choice-test.safetensors", identity) as ledger, bar() as display:
        field = Field(sparse, data, attacked, runs, settings, ledger)
        contenders = {name: best(result) for name, result in found.items()}
        count = field.pieces(0, field.attacked) * (1 + len(contenders))
        task = display.add_task("test images", total=count, note="")
        base = field.attack(Candidate(0.0), field.attacked, lambda: display.advance(task))
        first = next(iter(found.values()))
        rows.append(_row("base", Candidate(0.0), True, first, first.base, base, base))
        for name, (candidate, selected, chosen) in contenders.items():
            own = field.attack(candidate, field.attacked, lambda: display.advance(task))
            rows.append(_row(name, candidate, chosen, found[name], selected, base, own))
    return rows


def _row(
    name: str,
    candidate: Candidate,
    chosen: bool,
    result: AlphaSearch,
    selected: ModelOutcome,
    base: ModelOutcome,
    own: ModelOutcome,
) -> Row:
    there = result.change(selected)
    exact = PairedDifference.of(base.worst_of("/exact"), own.worst_of("/exact"))
    worst = PairedDifference.of(base.worst, own.worst)
    return Row(
        name, words(candidate.alpha, candidate.variant), chosen,
        len(selected.worst), there.estimate, there.low, there.high,
        len(own.clean), mean(own.clean), PairedDifference.of(base.clean, own.clean).estimate, len(own.worst),
        mean(own.worst_of("/exact")), exact.estimate, exact.low, exact.high,
        mean(own.worst), worst.estimate, worst.low, worst.high, torch.__version__,
    )  # fmt: skip


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Print the rows, and write them as CSV if a path is given."""
    table = Table(title=f"{rows[0].attacked} test images, in points against the base where signed")
    for heading in ("search", "setting", "chosen", "selection", "clean", "own gradient", "worst case"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row.search,
            row.setting,
            "yes" if row.chosen else "no",
            points(row.selection_change, row.selection_low, row.selection_high),
            f"{100 * row.clean:.1f} ({100 * row.clean_change:+.1f})",
            f"{100 * row.own:.1f} ({points(row.own_change, row.own_low, row.own_high)})",
            f"{100 * row.worst:.1f} ({points(row.worst_change, row.worst_low, row.worst_high)})",
        )
    Console(width=140).print(table)
    if path is not None:
        write(rows, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--selection", type=int, default=1000, help="selection images to attack")
    parser.add_argument("--attacked", type=int, default=2000, help="test images to attack")
    parser.add_argument("--cache", type=Path, default=Path(".cache/choice"), help="results of attacks as they come")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    report(measure(args.search, args.cache, args.attacked, args.selection), args.out)


if __name__ == "__main__":
    main()
