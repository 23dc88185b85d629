"""Time calibration beside the plain forward pass over the same images, and see how many images it needs.

    python -m benchmarks.calibration [--compiled] [--out benchmarks/results/calibration-cpu-1-thread.csv]
    python -m benchmarks.calibration images --data DIRECTORY [--out benchmarks/results/calibration-images.csv]

Contenders: the plain forward pass, this package's calibration, the same through torch.compile and
``options={"observe": True}`` beside its own compiled forward pass, and the published module's pass: forward pre-hooks
that add up the means of batch means and unbiased batch variances, in torch operators. `images` wants the IDX files of
Fashion-MNIST: how many of the 60,000 training images a tolerance takes, how far the statistics then are from those
of all, and what that does to accuracy.
"""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.data import load_images
from meansparse_fx.errors import ModelError
from meansparse_fx.zoo import load_model

from .harness import Call, Row, measure, options, run
from .paper.training import accuracy

ALPHA = 0.3
TOLERANCES = (0.1, 0.05, 0.02, 0.01)
BATCH = 128


def models(device: str, count: int) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Return by case a model and its batches, all in one device's memory; the small images are ``count`` at most."""
    images = torch.cat([bundled.load_split(name)[0] for name in bundled.SPLITS])[:count]
    cases = {f"bundled, {len(images):,} images 1x28x28": (bundled.load_model(), list(images.split(BATCH)))}
    noise = torch.rand(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with contextlib.suppress(ModelError):  # torchvision is not installed
        cases["resnet18, 32 images 3x224x224"] = (load_model("torchvision:resnet18"), list(noise.split(16)))
    return {name: (model.to(device), [b.to(device) for b in data]) for name, (model, data) in cases.items()}


def published_pass(model: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Hook calibration as published checkpoints were made, and return its sums of batch mean and unbiased variance."""
    sums: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))
        before = sums.get(module)
        sums[module] = (mean, variance) if before is None else (before[0] + mean, before[1] + variance)

    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.GELU)):
            module.register_forward_pre_hook(look)
    return sums


def over(batches: list[Tensor], run: Callable[[Tensor], object]) -> Call:
    """Return a pass of ``run`` over the batches."""

    @torch.inference_mode()
    def call() -> None:
        for batch in batches:
            run(batch)

    return call


def contenders(model: nn.Module, batches: list[Tensor]) -> dict[str, Call]:
    """Return the calls to time; the published pass is compared first, as far as it agrees."""
    sparse = msfx.transform(model, batches[0][:2])
    hooked = copy.deepcopy(model)  # the other contenders share the model's own modules
    sums = published_pass(hooked)
    over(batches, hooked)()
    own = msfx.calibrate(sparse, batches, progress=False)
    first, (mean, _) = next(iter(own.values())), next(iter(sums.values()))
    # A short last batch weighs as much as a long one there.
    torch.testing.assert_close((mean / len(batches)).double(), first.mean, rtol=0.05, atol=0.05)
    return {
        "plain forward": over(batches, model),
        "meansparse_fx.calibrate": lambda: msfx.calibrate(sparse, batches, progress=False),
        "published form": over(batches, hooked),
    }


def compiled_contenders(model: nn.Module, batches: list[Tensor]) -> dict[str, Call]:
    """Return the calls through torch.compile, their statistics compared first."""
    torch.compiler.reset()
    own = msfx.calibrate(msfx.transform(model, batches[0][:2]), batches, progress=False)
    plain, observing = torch.compile(model), torch.compile(model, backend="meansparse", options={"observe": True})
    over(batches, observing)()
    theirs = msfx.compile_report(observing).statistics()
    for name, site in own.items():
        # Convolutions and norms of the compiled model round differently.
        torch.testing.assert_close(theirs[name].mean, site.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(theirs[name].std, site.std, rtol=1e-3, atol=1e-4)
    return {"plain forward, compiled": over(batches, plain), "torch.compile, observe": over(batches, observing)}


def more_images(rows: list[Row], images: int) -> list[Row]:
    """Return what an image costs, apart from what a call costs once: of two lengths of pass.

    Args:
        rows: Of a pass over ``images``, then of the contenders' passes over twice as many.
    """
    half = len(rows) // 2
    times = [(b.milliseconds - a.milliseconds) / images for a, b in zip(rows, rows[half:], strict=False)]
    plain = times[[row.contender for row in rows].index("plain forward")]
    case = f"{rows[0].case}, an image more"
    return [
        row.but(case=case, milliseconds=time, low=None, high=None, ratio=time / plain)
        for row, time in zip(rows, times, strict=False)
    ]


def rows_of(case: str, model: nn.Module, batches: list[Tensor], device: str, repetitions: int) -> list[Row]:
    """Return the rows of one case: of a pass, then of an image more."""
    short, long = (contenders(model, batches * times) for times in (1, 2))
    calls = short | {f"{name}, twice": call for name, call in long.items()}
    rows = measure("calibration", case, calls, "plain forward", device, repetitions, warm_up=1)
    return rows[: len(short)] + more_images(rows, sum(map(len, batches)))


def compiled_rows_of(case: str, model: nn.Module, batches: list[Tensor], device: str, repetitions: int) -> list[Row]:
    """Return the rows of one case through torch.compile."""
    calls = compiled_contenders(model, batches)
    return measure("calibration", case, calls, "plain forward, compiled", device, repetitions)


def images_needed(directory: Path) -> list[Row]:
    """Return how many training images each tolerance takes, relative to each channel's deviation; 0 takes all.

    With it the largest distance of any channel's mean and deviation from those of all images, and accuracy at `ALPHA`.
    """
    train, test = load_images(directory, "train"), load_images(directory, "t10k")
    sparse = msfx.transform(bundled.load_model(), train.images[:2])
    whole = msfx.calibrate(sparse, train.images.split(BATCH))
    rows = []
    for tolerance in (0.0, *TOLERANCES):
        found = msfx.calibrate(sparse, train.images.split(BATCH), tolerance=tolerance) if tolerance else whole
        pairs = [(site, whole[name]) for name, site in found.items()]
        mean_error = max(float(((one.mean - other.mean).abs() / other.std).max()) for one, other in pairs)
        std_error = max(float((one.std / other.std - 1).abs().max()) for one, other in pairs)
        msfx.set_statistics(sparse, found)
        msfx.set_alpha(sparse, ALPHA)
        known = {"tolerance": tolerance, "images": found.images, "mean_error": mean_error, "std_error": std_error}
        right = accuracy(sparse, test.images, test.labels)
        rows.append(Row(**known, accuracy=right, test_images=len(test), torch=torch.__version__))
    return rows


def main() -> None:
    parser = options(__doc__, repetitions=11)
    parser.add_argument("what", nargs="?", choices=("time", "images"), default="time")
    parser.add_argument("--data", type=Path, help="directory of Fashion-MNIST's IDX files, for images")
    # All there are: what a pass costs once, some 25 milliseconds, must not weigh.
    parser.add_argument("--images", type=int, default=6000, help="of the bundled network's cases")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--case", default="", help="only models in whose name this is found")
    args = parser.parse_args()
    cases: dict[str, Callable[[], list[Row]]] = {}
    if args.what == "images":
        if args.data is None:
            parser.error("images needs --data")
        cases["images"] = partial(images_needed, args.data)
    else:
        for case, given in models(args.device, args.images).items():
            if args.case in case:
                cases[case] = partial(rows_of, case, *given, args.device, args.repetitions)
                if args.compiled:
                    cases[f"{case}, compiled"] = partial(compiled_rows_of, case, *given, args.device, args.repetitions)
    run(cases, args.out)


if __name__ == "__main__":
    main()
