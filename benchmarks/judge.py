"""The court: does `evaluate` convict what only looks robust, and leave alone what is honest?

    python -m benchmarks.judge [--images 150] [--out FILE]    every case; goes on where it was killed
    python -m benchmarks.judge --case "quantised logits"      some of them
    python -m benchmarks.judge page                           the table in docs/robustness.md

Masks in a model stand beside the plain network as its base, so that what they fake would be a gain. Masks in the
operator stand beside the network without it. Convicted is what the verdict calls a loss, masked, or in doubt. Honest
cases must not be, an honest gain included. A/A: the base under two seeds, its images resampled 200 times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.alpha import SEARCH_ATTACKS
from meansparse_fx.evaluate import Evaluation, ModelOutcome

from .harness import RESULTS, points, read, write
from .training import ACTIVATIONS, Recipe, train

ATTACKS = (*SEARCH_ATTACKS, "square", "apgd-start/annealed")
THREAT: dict[str, Any] = {"eps": bundled.EPS, "steps": 30, "queries": 300, "batch_size": 250, "attacks": ATTACKS}
RESAMPLED = 200
MARKS = ("<!-- made by benchmarks.judge -->", "<!-- end -->")


@dataclass(frozen=True, slots=True)
class Row:
    """One case; the fields are the CSV's columns.

    Attributes:
        case, kind: What stood before the court: ``mask in the model``, ``mask in the operator`` or ``honest``.
        convicted: A loss, masked, or in doubt.
        verdict: Its first words.
        failed: The checks that failed.
        gain, low, high: Change of the worst case, 95 % interval.
        own: Change under the operator's own gradient.
        images: Attacked.
        torch: Version.
    """

    case: str
    kind: str
    convicted: bool
    verdict: str
    failed: str
    gain: float
    low: float
    high: float
    own: float
    images: int
    torch: str


class Masked(nn.Module):
    """A network with something in front of it, behind it, or behind its first activation."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        behind: Callable[[Tensor], Tensor] | None = None,
        inside: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = bundled.load_model().requires_grad_(False)
        self.before, self.behind = before, behind
        if inside is not None:
            self.network.stem = nn.Sequential(self.network.stem, _Function(inside))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(x)
        x = self.network(x)
        return x if self.behind is None else self.behind(x)


class _Function(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def _reversed(x: Tensor) -> Tensor:
    return x + 2 * (x.detach() - x)


def _saturated(x: Tensor) -> Tensor:
    steps = 8 * x
    return (steps.floor() + torch.sigmoid(200 * (steps - steps.floor() - 0.5))) / 8


MASKS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "quantised input": {"before": lambda x: (16 * x).round() / 16},
    "saturating input": {"before": _saturated},
    "noise on the input": {"before": lambda x: x + 0.05 * torch.randn_like(x)},
    "dropout at test": {"before": lambda x: F.dropout(x, 0.1, True)},
    "gradient reversed": {"before": _reversed},
    "gradient lost": {"before": lambda x: x.detach()},
    "rounded features": {"inside": lambda x: (2 * x).round() / 2},
    "gradient reversed in the features": {"inside": _reversed},
    "softmax": {"behind": lambda z: F.softmax(z, 1)},
    "logits times 3,000": {"behind": lambda z: 3000 * z},
    "quantised logits": {"behind": lambda z: z.round()},
}
# alpha by site or for all, and how the band is set
OPERATORS: dict[str, tuple[Any, dict[str, str]]] = {
    "alpha 0.5 everywhere": (0.5, {}),
    "alpha 0.4 everywhere": (0.4, {}),
    "alpha 1.5 at one site": ({"blocks.0.act1": 1.5}, {}),
    "alpha 1 after the additions": ({"blocks.0.act2": 1.0, "blocks.1.act2": 1.0, "blocks.2.act2": 1.0}, {}),
    "edge variant, alpha 1": (1.0, {"variant": "edge"}),
    "zero centre, alpha 0.3": (0.3, {"centre": "zero"}),
}
HONEST_ALPHAS = (0.0, 0.01, 0.02, 0.05)
SHORT, LONG = 4, 20  # epochs on the 2,000 bundled calibration images


@dataclass(frozen=True, slots=True)
class Case:
    """What stands before the court: how it is made, and what the attacker may do."""

    kind: str
    make: Callable[[], tuple[fx.GraphModule, fx.GraphModule | None]]
    options: dict[str, Any] = field(default_factory=dict)


def cases(cache: Path) -> dict[str, Case]:
    """Return all cases by name; networks that are trained for them are kept in ``cache``."""
    found = {
        name: Case("mask in the model", lambda mask=mask: (captured(Masked(**mask)), captured(Masked())))
        for name, mask in MASKS.items()
    }
    found["two steps"] = Case(
        "mask in the model", lambda: (captured(bundled.load_model(), 0.2), None), {"steps": 2, "queries": 10}
    )
    for name, (alpha, variant) in OPERATORS.items():
        found[name] = Case(
            "mask in the operator", lambda a=alpha, v=variant: (captured(bundled.load_model(), a, **v), None)
        )
    for alpha in HONEST_ALPHAS:
        found[f"GELU, alpha {alpha:g}"] = Case("honest", lambda a=alpha: (captured(bundled.load_model(), a), None))
    for name in ACTIVATIONS:
        if name != "gelu":
            found[f"{name}, alpha 0.02"] = Case(
                "honest", lambda n=name: (captured(network(n, LONG, cache), 0.02), None)
            )
    for name in ("relu", "gelu"):
        found[f"{name}, trained shorter and longer"] = Case(
            "honest",
            lambda n=name: (captured(network(n, LONG, cache)), captured(network(n, SHORT, cache))),
        )
    return found


def captured(model: nn.Module, alpha: Any = 0.0, **variant: str) -> fx.GraphModule:
    """Return a model transformed and calibrated on the bundled images."""
    images, _ = bundled.load_split("calibration")
    sparse = msfx.transform(model.eval().requires_grad_(False), images[:2])
    msfx.calibrate(sparse, images.split(250), progress=False)
    msfx.set_variant(sparse, **variant)
    msfx.set_alpha(sparse, alpha)
    return sparse


def network(activation: str, epochs: int, cache: Path) -> nn.Module:
    """Return a network trained adversarially on the bundled calibration images."""
    path = cache / f"{activation}-{epochs}.pt"
    recipe = Recipe(activation=activation, epochs=epochs, steps=2, step_size=0.075, compile=False)
    if not path.exists():
        torch.save(train(recipe, *bundled.load_split("calibration")).state_dict(), path)
    model = bundled.network.FashionResNet(ACTIVATIONS[activation])
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def judge(name: str, case: Case, images: int) -> Row:
    """Return what `evaluate` makes of a case."""
    sparse, base = case.make()
    test = tuple(part[:images] for part in bundled.load_split("test"))
    found = msfx.evaluate(sparse, test, base=base, progress=False, **THREAT | case.options)
    words = found.verdict.split(":")[0]
    failed = [check.name for check in found.checks if not check.passed]
    convicted = bool(failed) or words in ("Loss", "Gain masked")
    return Row(
        name, case.kind, convicted, words, "; ".join(failed), found.gain.estimate, found.gain.low, found.gain.high,
        found.exact_gain.estimate, images, torch.__version__,
    )  # fmt: skip


def same_against_same(images: int) -> Row:
    """Return how often the base against itself, under two seeds, is called a real gain."""
    sparse = captured(bundled.load_model())
    test = tuple(part[:images] for part in bundled.load_split("test"))
    options = {"progress": False, "sanity_images": 0}
    pair = [msfx.evaluate(sparse, test, seed=seed, **THREAT | options) for seed in (0, 1000)]
    generator = np.random.default_rng(0)
    gains = 0
    for _ in range(RESAMPLED):
        index = torch.from_numpy(generator.integers(0, images, images))
        sides = [_resampled(found.base, index) for found in pair]
        if generator.random() < 0.5:
            sides.reverse()
        drawn = Evaluation(*sides, 0.0, bundled.EPS, "Linf", THREAT["steps"], THREAT["queries"], 0, 0.0)
        gains += drawn.verdict.startswith("Gain real")
    gain = Evaluation(pair[0].base, pair[1].base, 0.0, bundled.EPS, "Linf", THREAT["steps"], 0, 0, 0.0).gain
    return Row(
        "A/A", "same against same", gains > 0.025 * RESAMPLED, f"Gain real in {gains} of {RESAMPLED}", "",
        gain.estimate, gain.low, gain.high, gain.estimate, images, torch.__version__,
    )  # fmt: skip


def _resampled(outcome: ModelOutcome, index: Tensor) -> ModelOutcome:
    return ModelOutcome(outcome.clean[index], {name: mask[index] for name, mask in outcome.robust.items()})


def table(rows: list[Row]) -> str:
    """Return the rows as markdown, a sentence of counts before them."""
    masks = [row for row in rows if row.kind.startswith("mask")]
    honest = [row for row in rows if row.kind == "honest"]
    lines = [
        f"Of {len(masks)} planted masks {sum(row.convicted for row in masks)} are convicted, of {len(honest)} honest "
        f"cases {sum(row.convicted for row in honest)}. " + "; ".join(
            f"the base against itself: {row.verdict[0].lower()}{row.verdict[1:]} resampled runs"
            for row in rows if row.kind == "same against same"
        ) + f". {rows[0].images} images, {THREAT['steps']} steps, {THREAT['queries']} queries; without `apgd-t`.",
        "",
        "| case | kind | convicted | verdict | checks that failed | worst case | own gradient |",
        "|---|---|---|---|---|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {row.case} | {row.kind} | {'yes' if row.convicted else 'no'} | {row.verdict} | {row.failed} "
        f"| {points(row.gain, row.low, row.high)} | {100 * row.own:+.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def write_page(rows: list[Row], page: Path) -> None:
    """Put the table between the marks of a page."""
    before, rest = page.read_text().split(MARKS[0])
    behind = rest.split(MARKS[1], 1)[1]
    page.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{behind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("page",))
    parser.add_argument("--case", nargs="+", help="only these; the file keeps its others")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--cache", type=Path, default=Path(".cache/judge"))
    parser.add_argument("--out", type=Path, default=RESULTS / "judge.csv")
    args = parser.parse_args()
    rows = read(args.out, Row) if args.out.exists() else []
    if args.what != "page":
        args.cache.mkdir(parents=True, exist_ok=True)
        known = cases(args.cache)
        wanted = args.case or [*(n for n in (*known, "A/A") if n not in {row.case for row in rows})]
        for name in wanted:
            row = same_against_same(4 * args.images) if name == "A/A" else judge(name, known[name], args.images)
            Console(width=160).print(row)
            rows = [r for r in rows if r.case != name] + [row]
            rows.sort(key=lambda r: [*known, "A/A"].index(r.case))
            write(rows, args.out)
        return
    write_page(rows, Path(__file__).parents[1] / "docs/robustness.md")


if __name__ == "__main__":
    main()
