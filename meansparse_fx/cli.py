"""Floor 6: the command line. Each command loads, calls one verb of the package, and prints what it returned."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from typer.core import TyperGroup

from . import demo as demo_run
from .alpha import ALPHAS, select_alpha
from .calibrate import calibrate as run_calibrate
from .data import ImageSet, load_images
from .errors import ArtifactError, MeanSparseError, ModelError
from .evaluate import evaluate as run_evaluate
from .evaluate.attacks import ATTACKS
from .histogram import band_shares, feature_histogram
from .kernels.reference import BACKWARDS
from .operators import set_alpha
from .report import CLEAN_BUDGET, headline, write_report
from .statistics import Statistics
from .transform import inspect as run_inspect
from .transform import transform
from .zoo import IMAGENET, SPECS, Normalised, input_shape, load_model

HISTOGRAM_IMAGES = 64  # of the test images; enough values for a histogram, few enough for any model's memory
_DEFAULT_ALPHAS = ",".join(f"{a:g}" for a in ALPHAS)


class _Commands(TyperGroup):
    """A group that turns the user's errors into one line; bugs keep their traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except MeanSparseError as error:
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _fraction(text: str) -> float:
    """Return a number written as ``0.1`` or as ``8/255``."""
    numerator, _, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{text!r} is not a number from 0, such as 0.1 or 8/255")
    return value


def _shape(text: str) -> tuple[int, ...]:
    """Return the shape written as ``3,224,224``."""
    try:
        shape = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise typer.BadParameter(f"{text!r} is not a shape such as 3,224,224")
    return shape


def _normalisation(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return means and deviations: ``imagenet``, or written as ``0.5,0.5,0.5/0.25,0.25,0.25``."""
    if text == "imagenet":
        return IMAGENET
    try:
        mean, std = (tuple(float(n) for n in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean = std = ()
    if not mean or len(mean) != len(std) or min(std) <= 0:
        raise typer.BadParameter(f"{text!r} is neither 'imagenet' nor MEANS/DEVIATIONS such as 0.5,0.5,0.5/0.2,0.2,0.2")
    return mean, std


def _names(known: tuple[str, ...]):
    """Return a parser of comma-separated names out of ``known``."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    """Return comma-separated numbers."""
    return tuple(_fraction(part) for part in text.split(","))


Model = Annotated[str, typer.Argument(metavar="MODEL", help=SPECS)]
Weights = Annotated[Path | None, typer.Option(help="safetensors, or a state_dict (loaded with weights_only=True).")]
Classes = Annotated[int | None, typer.Option("--num-classes", min=1, help="Logits of a timm or torchvision model.")]
Normalise = Annotated[
    tuple | None,
    typer.Option(
        parser=_normalisation,
        metavar="imagenet|MEANS/DEVIATIONS",
        help="Normalise inside the model: images, and so eps, stay in [0, 1].",
    ),
]
Data = Annotated[
    Path,
    typer.Option(
        help="Directory of one directory of images per class, directory of IDX files, or .npz with arrays images and "
        "labels (or NAME_images and NAME_labels: --split NAME)."
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of the data: subdirectory, IDX prefix (t10k), or .npz name.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side images of a folder are resized and cropped to [224].")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many images, of a fixed shuffled order.")]
Skip = Annotated[int, typer.Option(min=0, help="Leave out the first images of that order: other commands saw them.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [cuda if there is one]")]
StatisticsFile = Annotated[Path, typer.Option("--statistics", exists=True, dir_okay=False, help="From calibrate.")]
# Any: defaults are text too, and go through the parser.
Eps = Annotated[Any, typer.Option(parser=_fraction, metavar="EPS", help="Radius of the ball: 0.1, 8/255, ...")]
Norm = Annotated[str, typer.Option(help="Linf or L2.")]
Attacks = Annotated[Any, typer.Option(parser=_names(ATTACKS), metavar="NAMES", help=f"Of {', '.join(ATTACKS)}.")]
Backwards = Annotated[
    Any, typer.Option(parser=_names(BACKWARDS), metavar="NAMES", help=f"Gradients: of {', '.join(BACKWARDS)}.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the gradient attacks.")]
Queries = Annotated[int, typer.Option(min=1, help="Queries of the Square attack.")]
Seed = Annotated[int, typer.Option(help="Of the attacks.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meansparse-fx {version('meansparse_fx')} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """MeanSparse as a compiler pass: find the activations, measure, rewrite, tune, and attack honestly."""


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    num_classes: Classes = None,
    normalise: Normalise = None,
    shape: Annotated[
        tuple | None,
        typer.Option(
            "--input-shape", parser=_shape, metavar="C,H,W", help="Shape of one image, if not the model's own."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Show every place in MODEL where the operator belongs, and why the others are left alone."""
    target = _device(device)
    net = _model(model, weights, num_classes, normalise, target)
    shape = shape or input_shape(net.model if isinstance(net, Normalised) else net)
    console().print(run_inspect(net, torch.rand(2, *shape, device=target)).table())


@app.command()
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Statistics file to write (safetensors).")],
    weights: Weights = None,
    num_classes: Classes = None,
    normalise: Normalise = None,
    split: Split = None,
    image_size: ImageSize = None,
    limit: Limit = None,
    skip: Skip = 0,
    batch_size: BatchSize = 128,
    device: Device = None,
) -> None:
    """Measure mean and deviation of every site's channels in one pass over training images."""
    if not out.parent.is_dir():
        raise ArtifactError(f"{out}: its directory does not exist")
    images = load_images(data, split, image_size=image_size, limit=limit, skip=skip)
    sparse = _transform(model, weights, num_classes, normalise, device, images)
    found = run_calibrate(sparse, images.loader(batch_size), metadata={"data": images.description, "model": model})
    found.save(out)
    console().print(f"{len(found)} sites, {found.images} images: {out}")


@app.command()
def select(
    model: Model,
    data: Data,
    statistics: StatisticsFile,
    weights: Weights = None,
    num_classes: Classes = None,
    normalise: Normalise = None,
    split: Split = None,
    image_size: ImageSize = None,
    limit: Limit = None,
    skip: Skip = 0,
    batch_size: BatchSize = 128,
    device: Device = None,
    alphas: Annotated[
        Any, typer.Option(parser=_numbers, metavar="NUMBERS", help="Candidates; 0 is always among them.")
    ] = _DEFAULT_ALPHAS,
    clean_budget: Annotated[
        Any, typer.Option(parser=_fraction, metavar="SHARE", help="Clean accuracy that may be lost, as a fraction.")
    ] = str(CLEAN_BUDGET),
    attacked: Annotated[
        int | None, typer.Option(min=1, help="Attack only the first images; clean accuracy is measured on all.")
    ] = None,
    eps: Eps = "8/255",
    norm: Norm = "Linf",
    attacks: Attacks = "apgd-ce",
    backwards: Backwards = "exact,identity",
    steps: Steps = 20,
    queries: Queries = 500,
    seed: Seed = 0,
) -> None:
    """Choose alpha on held-out images: best worst case under attack within the clean budget."""
    images = load_images(data, split, image_size=image_size, limit=limit, skip=skip)
    sparse = _transform(model, weights, num_classes, normalise, device, images, statistics)
    search = select_alpha(
        sparse,
        images.loader(batch_size),
        alphas=alphas,
        attacked=attacked,
        clean_budget=clean_budget,
        eps=eps,
        norm=norm,
        attacks=attacks,
        backwards=backwards,
        steps=steps,
        queries=queries,
        seed=seed,
    )
    console().print(search.table())
    console().print(f"alpha {search.alpha:g}", style="bold", highlight=False)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    statistics: StatisticsFile,
    alpha: Annotated[
        float, typer.Option(parser=_fraction, metavar="ALPHA", help="Half width of the band, from select.")
    ],
    out: Annotated[Path | None, typer.Option(help="Directory for report.json, report.html and plots.")] = None,
    weights: Weights = None,
    num_classes: Classes = None,
    normalise: Normalise = None,
    split: Split = None,
    image_size: ImageSize = None,
    limit: Limit = None,
    skip: Skip = 0,
    batch_size: BatchSize = 128,
    device: Device = None,
    eps: Eps = "8/255",
    norm: Norm = "Linf",
    attacks: Attacks = "apgd-ce",
    backwards: Backwards = "exact,identity",
    steps: Steps = 100,
    queries: Queries = 5000,
    seed: Seed = 0,
) -> None:
    """Compare MODEL with its base under the same attacks, on test images that nothing else saw."""
    images = load_images(data, split, image_size=image_size, limit=limit, skip=skip)
    sparse = _transform(model, weights, num_classes, normalise, device, images, statistics)
    set_alpha(sparse, alpha)
    evaluation = run_evaluate(
        sparse,
        images.loader(batch_size),
        eps=eps,
        norm=norm,
        attacks=attacks,
        backwards=backwards,
        steps=steps,
        queries=queries,
        seed=seed,
    )
    console().print(evaluation.table())
    console().print(headline(evaluation), style="bold", highlight=False)
    if out is not None:
        looked_at = _examples(images, HISTOGRAM_IMAGES, _device(device))
        measured = Statistics.load(statistics)
        write_report(
            out,
            model=model,
            plan=sparse.meta["plan"],
            statistics=measured,
            evaluation=evaluation,
            histogram=feature_histogram(sparse, looked_at),
            shares=band_shares(sparse, looked_at),
            data={
                "calibration": f"{measured.images} images, {measured.metadata.get('data', 'unknown')}",
                "test": images.description,
            },
        )
        console().print(f"report: {out / 'report.html'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the report.")] = Path("demo-out"),
    calibration_images: Annotated[int, typer.Option(min=2, max=2000)] = demo_run.CALIBRATION_IMAGES,
    selection_images: Annotated[int, typer.Option(min=1, max=2000)] = demo_run.SELECTION_IMAGES,
    test_images: Annotated[int, typer.Option(min=1, max=2000)] = demo_run.TEST_IMAGES,
    steps: Steps = demo_run.STEPS,
    seed: Seed = 0,
) -> None:
    """Run the whole job on the bundled robust network: a few minutes on a CPU, no download."""
    demo_run.run(
        out,
        console(),
        calibration_images=calibration_images,
        selection_images=selection_images,
        test_images=test_images,
        steps=steps,
        seed=seed,
    )


@app.command()
def show(file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Statistics file.")]) -> None:
    """Show what a statistics file holds."""
    statistics = Statistics.load(file)
    facts = "; ".join(f"{k} {v}" for k, v in statistics.metadata.items())
    table = Table(
        title=f"{len(statistics)} sites, {statistics.images} images; {facts}",
        caption=f"weights {statistics.fingerprint}",
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    for column in ("site", "channels", "values each", "means", "deviations"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, site in statistics.items():
        ranges = (f"{float(v.min()):.3g} to {float(v.max()):.3g}" for v in (site.mean, site.std))
        table.add_row(name, str(len(site.mean)), f"{site.count:,}", *ranges)
    console().print(table)


def console() -> Console:
    """Return the console for results: standard output, wide enough for a table where that is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ModelError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _model(
    spec: str, weights: Path | None, num_classes: int | None, normalise: tuple | None, device: torch.device
) -> nn.Module:
    model = load_model(spec, weights, num_classes)
    if normalise is not None:
        model = Normalised(model, *normalise)
    return model.eval().to(device)


def _transform(
    spec: str,
    weights: Path | None,
    num_classes: int | None,
    normalise: tuple | None,
    device: str | None,
    images: ImageSet,
    statistics: Path | None = None,
) -> fx.GraphModule:
    """Return the model transformed, its logits checked against the labels of ``images``."""
    target = _device(device)
    model = _model(spec, weights, num_classes, normalise, target)
    examples = _examples(images, 2, target)
    sparse = transform(model, examples, statistics=statistics)
    with torch.no_grad():
        images.check_labels(sparse(examples).shape[-1])
    return sparse


def _examples(images: ImageSet, count: int, device: torch.device) -> Tensor:
    return torch.stack([images[i][0] for i in range(min(count, len(images)))]).to(device)
