"""Time attacks on a transformed model beside the same attacks on its base.

    python -m benchmarks.attack [--images 32] [--steps 10] [--compile reduce-overhead] [--device cuda] [--out FILE]

Contenders: the base; the published module in the place of our operators; ours at alpha 0.2 with the operator's own
gradient and with the identity in its place, plain and fused; with --compile the base and ours fused in a mode of
torch.compile as well, as `evaluate(compile=)` runs them. Same images, same seed, in turns. Attacks: APGD-CE with a
fixed number of steps, on the bundled network and, for its cost alone, on --model with random weights; AutoAttack
(standard) on the bundled network.

An attack leaves an image alone once it is broken, so that a more robust model costs more time without being slower. So
AutoAttack's images are some that no contender loses: each model is asked for the same forward and backward passes of
as many images. What was asked is counted, and stands in each row: image passes, forward and backward.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.evaluate.attacks import VERSIONS, AttackSettings, attack
from meansparse_fx.evaluate.plan import FastModel

from .contenders import MODELS, build, with_form
from .harness import Row, measure, options, run

ALPHA = 0.2
# The paper reports AutoAttack at 1.02 to 1.03 of the base's time.
CONTENDERS = {
    "ours, exact": ("activation", "exact"),
    "ours, identity": ("activation", "identity"),
    "ours fused, exact": ("all", "exact"),
    "ours fused, identity": ("all", "identity"),
}


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter]:
    """Count the ``forward_images`` that go through a model, and ``backward_images`` where their gradient is taken."""
    passes = Counter(forward_images=0, backward_images=0)

    def backward(gradient: Tensor) -> None:
        passes["backward_images"] += len(gradient)

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        passes["forward_images"] += len(inputs[0])
        if logits.requires_grad:
            logits.register_hook(backward)

    with model.register_forward_hook(forward):
        yield passes


def contenders(model: nn.Module, images: Tensor, mode: str | None = None) -> dict[str, nn.Module]:
    """Return the base and its rivals, calibrated on ``images``; two of them compiled, if a mode is given."""
    model.requires_grad_(False)  # an attack wants the images' gradient alone
    statistics = msfx.calibrate(msfx.transform(model, images[:2]), [images], progress=False)
    plain = msfx.transform(model, images[:2], statistics=statistics, alpha=ALPHA)
    found = {"base": model, "published module": with_form(plain, "published")}
    for name, (fuse, backward) in CONTENDERS.items():
        options = {"statistics": statistics, "alpha": ALPHA, "backward": backward, "fuse": fuse}
        found[name] = msfx.transform(copy.deepcopy(model), images[:2], **options)
    compiled = {} if mode is None else {"base": found["base"], "ours fused, exact": found["ours fused, exact"]}
    return found | {f"{name}, {mode}": FastModel(own, mode, None) for name, own in compiled.items()}


def rows_of(
    case: str, names: tuple[str, ...], models: dict[str, nn.Module], data: tuple[Tensor, Tensor],
    settings: AttackSettings, device: str, repetitions: int,
) -> list[Row]:  # fmt: skip
    """Return one row a contender: the time of the attacks ``names`` on all images of ``data``."""
    calls = {
        contender: (lambda model=model: [attack(name, model, *data, settings) for name in names])
        for contender, model in models.items()
    }
    passes = {}
    for name, model in models.items():
        with counted(model) as passes[name]:
            calls[name]()
    assert passes["base"]["forward_images"], "an attack that asks nothing of its model"
    rows = measure("attack", case, calls, "base", device, repetitions, passes, warm_up=0)
    # Per image pass, a backward one counted as two forward ones, as the operations are.
    work = {name: own["forward_images"] + 2 * own["backward_images"] for name, own in passes.items()}
    return [row.but(ratio_per_pass=row.ratio * work["base"] / work[row.contender]) for row in rows]


def unbroken(
    models: dict[str, nn.Module], data: tuple[Tensor, Tensor], steps: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return ``count`` of the images that no model loses to APGD-CE at the full radius."""
    images, labels = data
    robust = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for model in models.values():
        found = attack("apgd-ce", model, images, labels, AttackSettings(bundled.EPS, steps=steps))
        with torch.no_grad():
            robust &= model(found).argmax(1) == labels
    if robust.sum() < count:
        raise SystemExit(f"{int(robust.sum())} images survive and {count} are wanted: raise --pool")
    return images[robust][:count], labels[robust][:count]


def main() -> None:
    parser = options(__doc__, repetitions=5)
    parser.add_argument("--images", type=int, default=32, help="images of an attack")
    parser.add_argument("--pool", type=int, default=100, help="images among which those for AutoAttack are looked for")
    parser.add_argument("--steps", type=int, default=10, help="of the gradient attacks; AutoAttack's own: 100")
    parser.add_argument("--queries", type=int, default=250, help="of Square; AutoAttack's own: 5000")
    parser.add_argument("--model", choices=MODELS, default="WRN-16-4", help="with random weights, for its cost alone")
    parser.add_argument("--compile", metavar="MODE", help="of torch.compile")
    args = parser.parse_args()
    settings = AttackSettings(bundled.EPS, steps=args.steps, queries=args.queries)
    images, labels = (part[: max(args.pool, args.images)].to(args.device) for part in bundled.load_split("selection"))
    trained = contenders(bundled.load_model().to(args.device), images, args.compile)
    # Half the radius that the images survived: none breaks on the way, and all models do the same work.
    half = replace(settings, eps=bundled.EPS / 2)
    on_trained = (trained, unbroken(trained, (images, labels), args.steps, args.images), half)
    torch.manual_seed(0)
    model, side = build(args.model).to(args.device), MODELS[args.model][1]
    images = torch.rand(args.images, 3, side, side, device=args.device)
    with torch.no_grad():
        labels = model(images).argmax(1)
    on_random = (contenders(model, images, args.compile), (images, labels), replace(settings, eps=8 / 255))
    sizes = f"{args.images} images, {args.steps} steps"
    asked = {
        f"bundled apgd-ce, {sizes}": (("apgd-ce",), *on_trained),
        f"bundled autoattack standard, {sizes}, {args.queries} queries": (VERSIONS["standard"], *on_trained),
        f"{args.model} apgd-ce, {sizes}": (("apgd-ce",), *on_random),
    }
    run({case: partial(rows_of, case, *own, args.device, args.repetitions) for case, own in asked.items()}, args.out)


if __name__ == "__main__":
    main()
