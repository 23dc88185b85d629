"""Floor 5: the verb. Attack the candidates in rungs, choose among those that came through, and refine site by site."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx

from ..arguments import autocast_dtype, half_width, items, number, whole
from ..batches import labelled
from ..errors import EvaluationError
from ..evaluate.ledger import Ledger, model_identity
from ..evaluate.outcome import PairedDifference, mean
from ..evaluate.plan import AttackPlan, fitting, plan_runs
from ..evaluate.provenance import check_calibration, check_distinct, hexadecimal, require_units
from ..evaluate.sanity import checks_of_labels
from ..evaluate.threat import AttackSettings
from ..names import ALPHAS, CLEAN_BUDGET, SEARCH_ATTACKS, VARIANTS
from ..operators import added, answers, operators, require_transformed, switched
from ..outputs import Logits, in_words
from ..passes import returning_logits
from ..progress import bar, say_resumed
from ..seen import image_marks
from .halving import Candidate, Trials, rung_sizes, successive_halving
from .result import AlphaSearch, Move, Refinement, better, choose, within_budget

RUNGS = 3
SIGNIFICANCE = 0.05


def select_alpha(
    sparse: fx.GraphModule,
    held_out: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    # What is tried.
    alphas: Sequence[float] = ALPHAS,
    variants: Sequence[str] = ("mean",),
    per_site: bool | str | Callable[[str], str] = False,
    site_alphas: Sequence[float] | None = None,
    # What is taken.
    clean_budget: float = CLEAN_BUDGET,
    significance: float = SIGNIFICANCE,
    # The attacker.
    eps: float = 8 / 255,
    norm: str = "Linf",
    attacks: Sequence[str] = SEARCH_ATTACKS,
    backwards: Sequence[str] = ("exact", "identity"),
    steps: int = 20,
    queries: int = 500,
    seed: int = 0,
    full_rows: bool = False,
    # How it is run.
    attacked: int | None = None,
    rungs: int = RUNGS,
    batch_size: int = 128,
    compile: bool | str | None = False,
    amp: torch.dtype | str | None = None,
    logits: Logits = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> AlphaSearch:
    """Return the alpha with the best worst case on held-out data among those within the clean budget.

    Clean accuracy does not show where robustness breaks down, so every candidate is attacked, by default with the
    operator's own gradient and with surrogates of it. The candidates are attacked on a quarter of the images,
    the better half of them on twice as many, the better half of these on all (successive halving). Among those that
    come through, from the smallest up, an alpha takes the place of a smaller one only if it is better beyond noise.
    The model's alpha and variant are left as they were; it remembers the search, so that `evaluate` notices the same
    images.

    Args:
        sparse: A transformed and calibrated model in eval mode.
        held_out: As in `evaluate`: images that calibration did not see and the final test will not use.
        alphas: Candidates; 0 is always among them, and may be the answer.
        variants: Of the operator, all in one search: see `set_variant`.
        per_site: Go on from the choice site by site: each site's alpha one step down, up, to 0, or to the best single
            alpha, wherever that is better beyond noise; the choice may then be a mapping. ``"stage"`` moves the sites
            of one resolution together (`SitePlan.stages`), and a function of a site's name returns the name of the
            group it is moved with.
        site_alphas: What to try at each site instead: one site alone bears a larger alpha than all together.
        clean_budget: Clean accuracy that may be lost, as a fraction of the images.
        significance: Of the paired one-sided test that says what is beyond noise; site by site it is divided by the
            number of moves.
        eps, norm, attacks, backwards, steps, queries, seed, full_rows: As in `evaluate`; attacks that start at another
            model's images are left out, there is none.
        attacked: Attack only the first so many images. Clean accuracy, which costs one pass, is measured on all of
            them: a budget of 0.3 points is three images in a thousand.
        rungs: 3 for a quarter, a half and all of the images; 1 attacks every candidate on all of them.
        batch_size, compile, amp, logits, checkpoint, progress: As in `evaluate`.

    Raises:
        StateError: The model is not transformed or not calibrated, or in train mode.
        EvaluationError: As in `evaluate`.
    """
    require_transformed(sparse, "select_alpha", calibrated=True)
    if not (isinstance(per_site, bool | None) or per_site == "stage" or callable(per_site)):
        raise EvaluationError(f'per_site is True, False, "stage" or a function of a site\'s name, not {per_site!r}')
    variants = items(variants)
    if unknown := [variant for variant in variants or [None] if variant not in VARIANTS]:
        raise EvaluationError(f"variants must be of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    grid = sorted({0.0, *(half_width(alpha, "each of alphas") for alpha in items(alphas))})
    own_grid = None if site_alphas is None else [half_width(a, "each of site_alphas") for a in items(site_alphas)]
    clean_budget, significance = number(clean_budget, "clean_budget"), number(significance, "significance")
    if not (0 <= clean_budget <= 1 and 0 < significance < 1):
        raise EvaluationError(
            f"clean_budget must be a fraction of the images from 0 to 1 and significance above 0 and below 1, got "
            f"{clean_budget:g} and {significance:g}"
        )
    attacked = None if attacked is None else whole(attacked, "attacked", 1)
    rungs, batch_size = whole(rungs, "rungs", 1), whole(batch_size, "batch_size", 1)
    amp = autocast_dtype(amp)
    keys = [(0.0, variants[0]), *((alpha, variant) for alpha in grid[1:] for variant in variants)]
    candidates = {key: Candidate(*key) for key in keys}
    settings = AttackSettings(eps=eps, norm=norm, steps=steps, queries=queries, seed=seed)
    planned = [run for run in plan_runs(attacks, backwards, settings.seed) if not run.kind.started]
    if not planned:
        raise EvaluationError("a search has no other model's images to start at: add an attack that starts by itself")
    model = returning_logits(sparse, logits)
    batches = labelled(held_out, batch_size, model)
    first = next(batches)
    require_units(sparse)
    plan = AttackPlan(fitting(planned, attacks, settings, model, *first), settings, full_rows, compile, amp)
    identity = model_identity(sparse, alpha=False) | plan.identity() | {"logits": in_words(logits)}
    ledger = Ledger(checkpoint, identity, None if checkpoint is None else answers(sparse, added(sparse).shape))
    with bar(progress) as display, switched(sparse), ledger:
        data = [first, *batches]
        settings.warn_if_wide(first[0])
        marks = torch.cat([image_marks(images).cpu() for images, _ in data])
        checks = [*check_calibration(sparse, first[0], marks), check_distinct(marks)]
        trials = Trials(model, data, attacked, plan, ledger)
        right, labels = trials.outcome(candidates[keys[0]]).clean, torch.cat([labels for _, labels in data])
        for check in (*checks, next(checks_of_labels(labels, len(labels), right))):
            if not check.passed:
                warnings.warn(f"select_alpha: {check.finding}", stacklevel=2)
        stops = rung_sizes(trials.attacked, rungs, len(keys))
        spans = zip([0, *stops], stops.items(), strict=False)
        total = sum(count * trials.attacks_left(start, stop) for start, (stop, count) in spans)
        if ledger.attacks:
            say_resumed(display, "attack", ledger.attacks + 1, total)
        task = display.add_task("select alpha", total=total, note="")
        successive_halving(trials, [*candidates.values()], stops, clean_budget, lambda: display.advance(task))
        outcomes = {key: trials.outcome(candidate) for key, candidate in candidates.items()}
        display.update(task, completed=total, note=f"base: worst case {mean(outcomes[keys[0]].worst):.1%}")
        alpha, variant = choose(outcomes, clean_budget, significance)
        table = {v: {a: o for (a, w), o in outcomes.items() if w == v or not a} for v in variants}
        seen = tuple(hexadecimal(marks))
        search = AlphaSearch(alpha, table.pop(variant), clean_budget, variant, table, threat=settings, images=seen)
        if per_site:
            tried = sorted({*own_grid} - {alpha}) if own_grid is not None else _proposals(grid, alpha, search.leader)
            start, groups = candidates[alpha, variant], _groups(sparse, per_site)
            each = significance / max(1, len(tried) * len(groups))
            chosen, moves = _site_by_site(trials, start, groups, tried, [*stops], clean_budget, each, display)
            search = replace(search, alpha=chosen, refinement=moves)
    added(sparse).choice = search.to_dict()  # whichever alpha is set from now on, these images were looked at
    return search


def _groups(sparse: fx.GraphModule, per_site: Any) -> dict[str, list[str]]:
    """Return the sites that move together, by the name of their group."""
    group = added(sparse).plan.stages().__getitem__ if per_site == "stage" else per_site
    found: dict[str, list[str]] = {}
    for site in operators(sparse):
        found.setdefault(group(site) if callable(group) else site, []).append(site)
    return found


def _site_by_site(
    trials: Trials,
    start: Candidate,
    groups: Mapping[str, Sequence[str]],
    proposals: Sequence[float],
    stops: Sequence[int],
    clean_budget: float,
    significance: float,
    display: Progress,
) -> tuple[float | dict[str, float], Refinement]:
    """Try each group of sites at other alphas, one after the other; return the best so found, and what was tried."""
    assert isinstance(start.alpha, float)
    task = display.add_task("site by site", total=len(proposals) * len(groups), note="")
    alphas = {site: start.alpha for sites in groups.values() for site in sites}
    base = trials.outcome(Candidate(0.0, start.variant))
    incumbent = trials.attack(start, stops[-1])
    moves = []
    for (group, sites), alpha in product(groups.items(), proposals):
        trial = alphas | dict.fromkeys(sites, alpha)
        candidate = Candidate(trial, start.variant)
        outcome = trials.outcome(candidate)
        change, taken = None, False
        if within_budget(base, outcome, clean_budget):
            for stop in stops:
                outcome = trials.attack(candidate, stop)
                change = PairedDifference.of(incumbent.worst[:stop], outcome.worst)
                if change.estimate <= 0:
                    break
            taken = stop == stops[-1] and better(incumbent, outcome, significance)
        attacked = 0 if change is None else len(outcome.worst)
        moves.append(Move(group, alpha, mean(outcome.clean), attacked, change, taken))
        if taken:
            alphas, incumbent = trial, outcome
        display.update(task, advance=1, note=f"worst case {mean(incumbent.worst):.1%}")
    moved = any(move.taken for move in moves)
    return alphas if moved else start.alpha, Refinement(start.alpha, incumbent, tuple(moves))


def _proposals(grid: Sequence[float], start: float, leader: float) -> list[float]:
    """Return the alphas to try at each site: 0, one step down, one step up, and the one that looks best for all."""
    below, above = [a for a in grid if a < start], [a for a in grid if a > start]
    return sorted({0.0, *below[-1:], *above[:1], leader} - {start})
