"""The court: does `evaluate` convict what only looks robust, and leave alone what is honest?

    python -m benchmarks.judge [--images 150] [--out FILE]    every case; goes on where it was killed
    python -m benchmarks.judge --case "quantised logits"      some of them

Masks in a model stand beside the plain network as its base, so that what they fake would be a gain. Masks in the
operator stand beside the network without it. Convicted is what the verdict calls a loss, masked, or in doubt. Honest
cases must not be, an honest gain included. A/A: the base under two seeds, its images resampled 200 times.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.alpha import SEARCH_ATTACKS
from meansparse_fx.evaluate import PairedDifference

from .harness import RESULTS, Row, options, read, run
from .paper.measure import interval
from .paper.training import ACTIVATIONS, Recipe, trained

ATTACKS = (*SEARCH_ATTACKS, "square", "apgd-start/annealed")
THREAT: dict[str, Any] = {"eps": bundled.EPS, "steps": 30, "queries": 300, "batch_size": 250, "attacks": ATTACKS}
RESAMPLED, AGAIN = 200, "A/A"


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def masked(where: str, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return the network with a function of its input, of its logits, or of what its first activation gives."""
    network, layer = bundled.load_model(), Function(function)
    if where == "inside":
        network.stem = nn.Sequential(network.stem, layer)
        return network
    return nn.Sequential(layer, network) if where == "before" else nn.Sequential(network, layer)


def _reversed(x: Tensor) -> Tensor:
    return x + 2 * (x.detach() - x)


def _saturated(x: Tensor) -> Tensor:
    steps = 8 * x
    return (steps.floor() + torch.sigmoid(200 * (steps - steps.floor() - 0.5))) / 8


MASKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "quantised input": ("before", lambda x: (16 * x).round() / 16),
    "saturating input": ("before", _saturated),
    "noise on the input": ("before", lambda x: x + 0.05 * torch.randn_like(x)),
    "dropout at test": ("before", lambda x: F.dropout(x, 0.1, True)),
    "gradient reversed": ("before", _reversed),
    "gradient lost": ("before", lambda x: x.detach()),
    "rounded features": ("inside", lambda x: (2 * x).round() / 2),
    "gradient reversed in the features": ("inside", _reversed),
    "softmax": ("after", lambda z: F.softmax(z, 1)),
    "logits times 3,000": ("after", lambda z: 3000 * z),
    "quantised logits": ("after", lambda z: z.round()),
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

    def own(*settings: Any, **variant: str) -> Callable[[], Any]:
        return lambda: (captured(bundled.load_model(), *settings, **variant), None)

    def beside_the_plain(*mask: Any) -> Callable[[], Any]:
        return lambda: (captured(masked(*mask)), captured(bundled.load_model()))

    def trained_for(n: str, *epochs: int) -> Callable[[], Any]:
        return lambda: tuple(captured(network(n, each, cache)) for each in epochs)

    found = {name: Case("mask in the model", beside_the_plain(*mask)) for name, mask in MASKS.items()}
    found["two steps"] = Case("mask in the model", own(0.2), {"steps": 2, "queries": 10})
    for name, (alpha, variant) in OPERATORS.items():
        found[name] = Case("mask in the operator", own(alpha, **variant))
    honest = {f"GELU, alpha {alpha:g}": own(alpha) for alpha in HONEST_ALPHAS}
    for n in ACTIVATIONS:
        if n != "gelu":
            honest[f"{n}, alpha 0.02"] = lambda n=n: (captured(network(n, LONG, cache), 0.02), None)
    honest |= {f"{n}, trained shorter and longer": trained_for(n, LONG, SHORT) for n in ("relu", "gelu")}
    return found | {name: Case("honest", make) for name, make in honest.items()}


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
    recipe = Recipe(activation=activation, epochs=epochs, steps=2, step_size=0.075, compile=False)
    model = trained(recipe, lambda: bundled.load_split("calibration"), cache)
    return model.to(memory_format=torch.contiguous_format)


def judge(name: str, case: Case, images: int) -> Row:
    """Return what `evaluate` makes of a case: convicted by its verdict's first words, or by a check that failed."""
    sparse, base = case.make()
    test = tuple(part[:images] for part in bundled.load_split("test"))
    found = msfx.evaluate(sparse, test, base=base or msfx.restore(sparse), progress=False, **THREAT | case.options)
    words = found.verdict.split(":")[0]
    failed = [check.name for check in found.checks if not check.passed]
    row = Row(case=name, kind=case.kind, convicted=bool(failed) or words in ("Loss", "Gain masked"))
    row |= {"verdict": words, "failed": "; ".join(failed)} | interval(found.gain, "gain")
    return row.but(own=found.exact_gain.estimate, images=found.n_test, torch=torch.__version__)


def same_against_same(images: int) -> Row:
    """Return how often the base against itself, under two seeds, is a real gain: one whose interval lies above 0."""
    sparse = captured(bundled.load_model())
    test = tuple(part[:images] for part in bundled.load_split("test"))
    given: dict[str, Any] = THREAT | {"progress": False, "sanity_images": 0}
    pair = [msfx.evaluate(sparse, test, base=msfx.restore(sparse), seed=seed, **given).base.worst for seed in (0, 1000)]
    images = len(pair[0])  # there may be fewer
    generator = np.random.default_rng(0)
    gains = 0
    for _ in range(RESAMPLED):
        index = torch.from_numpy(generator.integers(0, images, images))
        sides = [worst[index] for worst in (pair[::-1] if generator.random() < 0.5 else pair)]
        gains += PairedDifference.of(*sides).low > 0
    gain = PairedDifference.of(*pair)
    row = Row(case=AGAIN, kind="same against same", convicted=gains > 0.025 * RESAMPLED)
    row |= {"verdict": f"Gain real in {gains} of {RESAMPLED}"} | interval(gain, "gain")
    return row.but(own=gain.estimate, images=images, torch=torch.__version__)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(out=RESULTS / "judge.csv")
    parser.add_argument("--case", nargs="+", help="only these; the file keeps its others")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--cache", type=Path, default=Path(".cache/judge"))
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    calls = {name: partial(judge, name, case, args.images) for name, case in cases(args.cache).items()}
    calls[AGAIN] = partial(same_against_same, 4 * args.images)
    asked = args.case or [name for name in calls if name not in {row.case for row in read(args.out)}]
    run({name: lambda call=calls[name]: [call()] for name in asked}, args.out)


if __name__ == "__main__":
    main()
