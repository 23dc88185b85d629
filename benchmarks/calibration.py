"""Time calibration beside the plain forward pass over the same images, and see how many images it needs.

    python -m benchmarks.calibration [--compiled] [--out benchmarks/results/calibration-cpu.csv]
    python -m benchmarks.calibration images --data DIRECTORY [--out benchmarks/results/calibration-images.csv]

Contenders: the plain forward pass, this package's calibration, the same through torch.compile and
``options={"observe": True}`` beside its own compiled forward pass, and the published module's pass: forward pre-hooks
that add up the means of batch means and unbiased batch variances, in torch operators. `images` wants the IDX files of
Fashion-MNIST: how many of the 60,000 training images a tolerance takes, how far the statistics then are from those
of all, and what that does to accuracy.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import meansparse_fx as msfx
from meansparse_fx import bundled
from meansparse_fx.data import ImageSet, load_images
from meansparse_fx.errors import ModelError
from meansparse_fx.statistics import Statistics
from meansparse_fx.zoo import load_model

from .harness import Call, Row, measure, options, report

ALPHA = 0.3
TOLERANCES = (0.1, 0.05, 0.02, 0.01)
BATCH = 128


def models(device: str) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Return by case a model and its batches, all in one device's memory."""
    # All 6,000: what a pass costs once, some 25 milliseconds, must not weigh.
    images = torch.cat([bundled.load_split(name)[0] for name in bundled.SPLITS])
    cases = {"bundled, 6,000 images 1x28x28": (bundled.load_model(), list(images.split(BATCH)))}
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
        replace(row, case=case, milliseconds=time, low=None, high=None, ratio=time / plain)
        for row, time in zip(rows, times, strict=False)
    ]


def time_all(device: str, repetitions: int, compiled: bool, only: str = "") -> list[Row]:
    """Return the rows of all cases, or of those in whose name ``only`` is found."""
    rows: list[Row] = []
    for case, (model, batches) in models(device).items():
        if only not in case:
            continue
        short, long = (contenders(model, batches * times) for times in (1, 2))
        calls = short | {f"{name}, twice": call for name, call in long.items()}
        own = measure("calibration", case, calls, "plain forward", device, repetitions)
        rows += own[: len(short)] + more_images(own, sum(map(len, batches)))
        if compiled:
            calls = compiled_contenders(model, batches)
            rows += measure("calibration", case, calls, "plain forward, compiled", device, repetitions)
    return rows


@dataclass(frozen=True, slots=True)
class Need:
    """How many images one tolerance took, and how good the result is against all images; the CSV's columns.

    Attributes:
        tolerance: Asked for, relative to each channel's deviation; 0 is the full pass.
        estimated: Largest standard error of any channel's mean or deviation, as calibration said.
        mean_error, std_error: Largest real distance of a channel's mean and deviation from those of all images.
        moved_estimated, moved: Share of activations of test images on the other side of the band at `ALPHA`.
        accuracy: Of the test images at `ALPHA`.
    """

    tolerance: float
    images: int
    estimated: float
    mean_error: float
    std_error: float
    moved_estimated: float
    moved: float
    accuracy: float
    test_images: int
    torch: str


def images_needed(directory: Path) -> list[Need]:
    """Return a row for each tolerance; calibration sees training images only, in the fixed shuffled order."""
    train, test = load_images(directory, "train"), load_images(directory, "t10k")
    sparse = msfx.transform(bundled.load_model(), train.images[:2])
    whole = msfx.calibrate(sparse, train.images.split(BATCH))
    rows = []
    for tolerance in (0.0, *TOLERANCES):
        found = whole
        if tolerance:
            found = msfx.calibrate(sparse, train.images.split(BATCH), tolerance=tolerance, progress=False)
        estimated, moved_estimated = _promised(found)
        pairs = [(site, whole[name]) for name, site in found.items()]
        mean_error = max(float(((one.mean - other.mean).abs() / other.std).max()) for one, other in pairs)
        std_error = max(float((one.std / other.std - 1).abs().max()) for one, other in pairs)
        moved, accuracy = _moved(sparse, found, whole, test.images[:1000]), _accuracy(sparse, found, test)
        figures = (estimated, mean_error, std_error, moved_estimated, moved, accuracy)
        rows.append(Need(tolerance, found.images, *figures, len(test), torch.__version__))
    return rows


def _promised(statistics: Statistics) -> tuple[float, float]:
    """Return the largest error and the share moved that calibration estimated, from its record."""
    if "precision" not in statistics.metadata:
        return 0.0, 0.0
    error, moved = re.findall(r"([0-9.e-]+) %", statistics.metadata["precision"])[:2]
    return float(error) / 100, float(moved) / 100


def _moved(sparse: nn.Module, one: Statistics, other: Statistics, images: Tensor) -> float:
    """Return the share of all activations that lie inside the band of one and outside that of the other."""
    changed = total = 0

    def look(operator: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal changed, total
        inside = []
        for site in (one[operator.name], other[operator.name]):
            mean, std = (vector.float().view(1, -1, 1, 1) for vector in (site.mean, site.std))
            inside.append((inputs[0] - mean).abs() <= ALPHA * std)
        changed += int((inside[0] != inside[1]).sum())
        total += inputs[0].numel()

    msfx.set_alpha(sparse, 0.0)
    hooks = [operator.register_forward_pre_hook(look) for operator in msfx.operators(sparse).values()]
    over(list(images.split(BATCH)), sparse)()
    for hook in hooks:
        hook.remove()
    return changed / total


def _accuracy(sparse: nn.Module, statistics: Statistics, test: ImageSet) -> float:
    msfx.set_statistics(sparse, statistics)
    msfx.set_alpha(sparse, ALPHA)
    with torch.inference_mode():
        guesses = torch.cat([sparse(batch).argmax(1) for batch in test.images.split(BATCH)])
    return float((guesses == test.labels).float().mean())


def main() -> None:
    parser = options(__doc__, repetitions=11)
    parser.add_argument("what", nargs="?", choices=("time", "images"), default="time")
    parser.add_argument("--data", type=Path, help="directory of Fashion-MNIST's IDX files, for images")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--case", default="", help="only models in whose name this is found")
    args = parser.parse_args()
    if args.what == "time":
        report(time_all(args.device, args.repetitions, args.compiled, args.case), args.out)
    elif args.data is None:
        parser.error("images needs --data")
    else:
        title = f"images a tolerance takes, bundled network, alpha {ALPHA:g}"
        report(images_needed(args.data), args.out, title)


if __name__ == "__main__":
    main()
