"""What the choice of alpha buys on the bundled network: one alpha for all, variants of the operator, an alpha by site.

    python -m benchmarks.choice [--out benchmarks/results/choice.csv]

Each search sees the selection images alone, and attacks the first 400 of them. What it chooses, or, where nothing is
better than the base beyond noise, what looked best to it, is then attacked on 500 of the 2,000 test images by
`evaluate`'s attacks (100 steps, the three nearest classes, 1,000 queries), each on what those before it left. Killed at
any moment it goes on; half an hour on one core.
"""

import json
from pathlib import Path
from typing import Any

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.alpha import AlphaSearch
from meansparse_fx.alpha.halving import Alpha, Candidate
from meansparse_fx.cli.demo import ALPHAS
from meansparse_fx.evaluate import AttackSettings, ModelOutcome, PairedDifference
from meansparse_fx.evaluate.outcome import mean
from meansparse_fx.progress import bar

from .harness import Row, options, run
from .paper.measure import BATCH, Laboratory, changes, interval, on_images

SITE_ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8)  # one site alone bears more than all together
SEARCHES: dict[str, dict[str, Any]] = {
    "one alpha": {},
    "variants": {"variants": ("edge", "smooth")},
    "by site": {"per_site": True, "site_alphas": SITE_ALPHAS},
}
STEPS = 30  # of the search; see `meansparse_fx.cli.demo` for why not fewer


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


def measure(cache: Path, attacked: int, selection: int) -> list[Row]:
    """Return the rows: the base, then each search's best on the test images."""
    sparse = Laboratory(None, cache, attacked).sparse("GELU")
    settings = AttackSettings(bundled.EPS, steps=100, queries=1000, target_classes=3)
    how: dict[str, Any] = {"alphas": ALPHAS, "eps": bundled.EPS, "steps": STEPS, "batch_size": BATCH}
    held_out, found = bundled.load_split("selection"), {}
    for name, more in SEARCHES.items():
        path = cache / f"choice-{name.replace(' ', '-')}.safetensors"
        found[name] = msfx.select_alpha(sparse, held_out, checkpoint=path, attacked=selection, **how, **more)
    first = next(iter(found.values()))
    contenders = {"base": (Candidate(0.0), first.base, True)} | {name: best(own) for name, own in found.items()}
    rows: list[Row] = []
    path, test = cache / "choice-test.safetensors", bundled.load_split("test")
    with on_images(sparse, test, attacked, ("adaptive",), settings, path) as trials, bar() as shown:
        task = shown.add_task("test images", total=trials.attacks_left(0, trials.attacked) * len(contenders), note="")
        outcomes = {
            name: trials.attack(candidate, trials.attacked, lambda: shown.advance(task))
            for name, (candidate, _, _) in contenders.items()
        }
    base = outcomes["base"]
    for name, (candidate, selected, chosen) in contenders.items():
        own = outcomes[name]
        row = Row(search=name, setting=words(candidate.alpha, candidate.variant), chosen=chosen)
        row["selection_images"] = len(selected.worst)
        row |= interval(found.get(name, first).change(selected), "selection_change", "selection_")
        row |= {"images": len(own.clean), "clean": mean(own.clean)}
        row["clean_change"] = PairedDifference.of(base.clean, own.clean).estimate
        rows.append(row.but(**changes(base, own)))
    return rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--selection", type=int, default=400, help="selection images to attack")
    parser.add_argument("--attacked", type=int, default=500, help="test images to attack")
    parser.add_argument("--cache", type=Path, default=Path(".cache/choice"), help="results of attacks as they come")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    run({"choice": lambda: measure(args.cache, args.attacked, args.selection)}, args.out)


if __name__ == "__main__":
    main()
