"""What does `evaluate`'s default leave to an attacker who runs everything there is?

    python -m benchmarks.strongest --network GELU ReLU PSiLU --data DIRECTORY     the paper's networks, in small
    python -m benchmarks.strongest --network bundled --alpha 0.1 0.2 0.3 0.4      the bundled one

First the default. Then what it left, in the base or in the transformed model, is attacked with twice the steps, five
restarts and other surrogates, and Square from another seed. Goes on where it was killed; hours on one core.
"""

from pathlib import Path
from typing import Any

import torch

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.evaluate import PairedDifference
from meansparse_fx.evaluate.outcome import mean

from .harness import RESULTS, Row, options, run
from .paper.measure import Laboratory, interval

BUNDLED = "bundled"
BATCH = 100
STRONGEST = (
    *("apgd-ce-r5/identity", "apgd-ce-r5/smooth-3", "apgd-ce-r5/annealed", "apgd-dlr-r5/annealed"),
    *("apgd-margin/smooth", "apgd-t/smooth", "square", "apgd-start/smooth-3"),
)
STEPS, SEED = 200, 1000


def measure(laboratory: Laboratory, network: str, alpha: float, images: int, cache: Path) -> Row:
    """Return both evaluations of one setting, each kept in ``cache`` as it comes."""
    sparse = laboratory.sparse("GELU" if network == BUNDLED else network)
    split = bundled.load_split("test") if network == BUNDLED else laboratory.images("test")
    inputs, labels = (part[:images] for part in split)
    msfx.set_alpha(sparse, alpha)
    given: dict[str, Any] = {"eps": bundled.EPS, "batch_size": BATCH, "sanity_images": 0}
    name = f"strongest-{network}-{alpha:g}-{images}"
    first = msfx.evaluate(sparse, (inputs, labels), checkpoint=cache / f"{name}.default", **given)
    left = first.base.worst | first.sparse.worst
    given |= {"attacks": STRONGEST, "steps": STEPS, "seed": SEED, "checkpoint": cache / f"{name}.strongest"}
    second = msfx.evaluate(sparse, (inputs[left], labels[left]), **given)
    row = Row(network=network, alpha=alpha, images=images, base=mean(first.base.worst))
    row |= interval(PairedDifference.of(first.base.worst, first.sparse.worst), "gain")
    base, own = first.base.worst.clone(), first.sparse.worst.clone()
    base[left] &= second.base.worst
    own[left] &= second.sparse.worst
    row["strongest_base"] = mean(base)
    row |= interval(PairedDifference.of(base, own), "strongest_gain", "strongest_")
    return row.but(torch=torch.__version__)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(out=RESULTS / "strongest.csv")
    parser.add_argument("--network", nargs="+", default=[BUNDLED], help="bundled, or of the paper's in small")
    parser.add_argument("--alpha", nargs="+", type=float, default=[0.4])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--data", type=Path, help="directory of Fashion-MNIST's IDX files")
    parser.add_argument("--cache", type=Path, default=Path(".cache/paper"), help="networks and results of attacks")
    args = parser.parse_args()
    calls = {}
    for network in args.network:
        laboratory = Laboratory(None if network == BUNDLED else args.data, args.cache, args.images)
        for alpha in args.alpha:
            given = (laboratory, network, alpha, args.images, args.cache)
            calls[f"{network}, {alpha}"] = lambda given=given: [measure(*given)]
    run(calls, args.out)


if __name__ == "__main__":
    main()
