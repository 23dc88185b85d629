"""Floor 5: choose alpha on held-out data, against the worst of several attacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx

from .evaluate.attacks import AttackSettings
from .evaluate.outcome import ModelOutcome
from .evaluate.run import attack_batch, batches, correct, plan_runs
from .operators import operators, require_transformed, set_alpha, switched
from .progress import bar
from .tables import as_text

ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class AlphaSearch:
    """What a search over alpha found.

    Attributes:
        alpha: The choice: best worst case among the candidates within the clean budget.
        outcomes: alpha to what the model did there, ascending; clean on all images, robust on those attacked.
        clean_budget: Clean accuracy that was allowed to be lost, as a fraction.
    """

    alpha: float
    outcomes: dict[float, ModelOutcome]
    clean_budget: float

    def to_dict(self) -> dict:
        """Return the choice and one row an alpha as plain values; accuracies are fractions."""
        rows = [{"alpha": a, **o.to_dict()} for a, o in self.outcomes.items()]
        return {"alpha": self.alpha, "clean_budget": self.clean_budget, "rows": rows}

    def table(self) -> Table:
        """Return the search as a rich table, in percent."""
        first = next(iter(self.outcomes.values()))
        table = Table(
            title=f"{len(first.clean)} held-out images, {len(first.worst)} of them attacked; "
            f"at most {100 * self.clean_budget:.1f} points of clean loss",
            title_justify="left",
            show_edge=False,
            pad_edge=False,
        )
        for column in ("alpha", "clean", *first.robust, "worst case", ""):
            table.add_column(column, justify="right")
        for alpha, found in self.outcomes.items():
            values = found.to_dict()
            numbers = [values["clean"], *values["robust"].values(), values["worst_case"]]
            chosen = alpha == self.alpha
            table.add_row(
                f"{alpha:g}",
                *(f"{100 * v:.1f}" for v in numbers),
                "chosen" if chosen else "",
                style="bold" if chosen else None,
            )
        return table

    def __str__(self) -> str:
        return as_text(self.table(), width=110)


def select_alpha(
    sparse: fx.GraphModule,
    held_out: Iterable[Any] | tuple[Tensor, Tensor],
    *,
    alphas: Sequence[float] = ALPHAS,
    eps: float = 8 / 255,
    norm: str = "Linf",
    attacks: Sequence[str] = ("apgd-ce",),
    backwards: Sequence[str] = ("exact", "identity"),
    steps: int = 20,
    queries: int = 500,
    attacked: int | None = None,
    clean_budget: float = 0.003,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> AlphaSearch:
    """Return the alpha with the best worst case on held-out data among those within the clean budget.

    Clean accuracy does not show where robustness breaks down, so every candidate is attacked, by default
    with the operator's own gradient and with the identity's. The model's alpha is left as it was.

    Args:
        sparse: A transformed and calibrated model in eval mode.
        held_out: As in `evaluate`: images that calibration did not see and the final test will not use.
        alphas: Candidates; 0 is always among them, and may be the answer.
        attacked: Attack only the first so many images. Clean accuracy, which costs one pass, is measured on all of
            them: a budget of 0.3 points is three images in a thousand.
        clean_budget: Clean accuracy that may be lost, as a fraction of the images.
        eps, norm, attacks, backwards, steps, queries, batch_size, seed, progress: As in `evaluate`.
    """
    require_transformed(sparse, "select_alpha")
    candidates = sorted({0.0, *map(float, alphas)})
    settings = AttackSettings(eps=eps, norm=norm, steps=steps, queries=queries)
    runs = plan_runs(attacks, backwards, seed)
    data = list(batches(held_out, batch_size, next(iter(operators(sparse).values())).mean.device))
    under_attack = list(_first(data, attacked))
    outcomes: dict[float, ModelOutcome] = {}
    with bar(progress) as display, switched(sparse):
        task = display.add_task("select alpha", total=len(candidates) * len(under_attack) * len(runs), note="")
        for alpha in candidates:
            set_alpha(sparse, alpha)
            clean = torch.cat([correct(sparse, images, labels).cpu() for images, labels in data])
            survivors: dict[str, list[Tensor]] = {run.name: [] for run in runs}
            for images, labels in under_attack:
                for run, _, survived in attack_batch(sparse, images, labels, runs, settings):
                    survivors[run.name].append(survived.cpu())
                    display.advance(task)
            robust = {name: torch.cat(masks) for name, masks in survivors.items()}
            outcomes[alpha] = ModelOutcome(clean, {n: mask & clean[: len(mask)] for n, mask in robust.items()})
            display.update(task, note=f"alpha {alpha:g}: worst case {outcomes[alpha].worst.double().mean():.1%}")
    return AlphaSearch(_choose(outcomes, clean_budget), outcomes, clean_budget)


def _first(data: Iterable[tuple[Tensor, Tensor]], count: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches until ``count`` images, the last batch cut; all of them if None."""
    for images, labels in data:
        if count is not None and count <= 0:
            return
        yield images[:count], labels[:count]
        count = None if count is None else count - len(images)


def _choose(outcomes: dict[float, ModelOutcome], clean_budget: float) -> float:
    """Return the alpha that keeps most images in the worst case; the smaller one where two keep as many."""
    floor = outcomes[0.0].clean.double().mean() - clean_budget
    allowed = [a for a, o in outcomes.items() if o.clean.double().mean() >= floor - 1e-12]
    return max(allowed, key=lambda a: (int(outcomes[a].worst.sum()), -a))
