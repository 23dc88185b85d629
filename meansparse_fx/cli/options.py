"""Floor 6: the options that commands share, in groups, each written once.

A group is a frozen dataclass whose fields are options; a command takes the group as one parameter, and
`with_groups_as_options` shows typer the fields, in help under the group's docstring. To give all commands that load a
model one more option, add one field to `ModelOptions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import OptionInfo

from ..errors import StateError
from ..names import ATTACK_NAMES, AUTOCAST, DEFAULT_ATTACKS, NORMS, PLACEMENTS, SPECS, SURROGATES
from . import parsing


def parsed(parser: Callable[[str], Any], metavar: str, help: str, *names: str) -> Any:
    """Return an option of which the text, and so a default's text, goes through a parser."""
    return typer.Option(*names, parser=parser, metavar=metavar, help=help)


def file_option(help: str) -> Any:
    """Return the option that is a file which another command wrote."""
    return typer.Option(exists=True, dir_okay=False, help=help)


def file_argument(help: str) -> Any:
    """Return the argument that is a file which another command wrote."""
    return typer.Argument(exists=True, dir_okay=False, metavar="FILE", help=help)


SETTINGS = "settings.msfx.safetensors"  # as evaluate and card call it in their folders
_DEFAULT_ATTACKS = ", ".join(DEFAULT_ATTACKS)
Attacks = Annotated[
    Any, parsed(parsing.attacks, "NAMES", f"Of {', '.join(ATTACK_NAMES)}; with /GRADIENT, or under all --backwards.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the gradient attacks.")]
Queries = Annotated[int, typer.Option(min=1, help="Queries of the Square attack.")]
Seed = Annotated[int, typer.Option(help="Seed of the attacks.")]
LogitsName = Annotated[
    Any, parsed(parsing.name_or_position, "NAME", "Key or position of logits in MODEL's output; else logits, out.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do one batch, say how long all would take, keep nothing.")]
Alpha = Annotated[
    str | None,
    typer.Option(
        metavar="ALPHA|FILE|leader",
        help='Half width of the band in standard deviations: a number, a JSON file {"alpha": ALPHA or {SITE or REGEX: '
        'ALPHA, ...}, "variant": NAME}, or leader: what looked best to select, even if it chose 0. By default that of '
        "--settings.",
    ),
]
Amp = Annotated[Any, parsed(parsing.name(AUTOCAST), "DTYPE", f"Autocast the model: {' or '.join(AUTOCAST)}.")]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[str, typer.Argument(parser=parsing.model, metavar="MODEL", help=SPECS)]
    weights: Annotated[
        Path | None, typer.Option(exists=True, help="safetensors, or what torch.load reads with weights_only=True.")
    ] = None
    num_classes: Annotated[int | None, typer.Option(min=1, help="Classes of a timm or torchvision model.")] = None
    normalise: Annotated[
        tuple | None,
        parsed(
            parsing.normalisation,
            "imagenet|MEAN/STD",
            "Normalise images in front of MODEL, such as 0.5/0.2: it then takes images in [0, 1].",
        ),
    ] = None
    placement: Annotated[
        Any, parsed(parsing.name(PLACEMENTS), "NAME", f"Sites to rewrite: {', '.join(PLACEMENTS)}.")
    ] = PLACEMENTS[0]
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Rewrite only sites whose name matches; repeatable.")
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave out sites whose name matches; repeatable.")
    ] = None
    settings: Annotated[
        Path | None, file_option("File of calibrate --out, select --out or msfx.save: all but the weights.")
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="cuda if there is one")] = None

    def __post_init__(self) -> None:
        if self.settings is not None and (self.include or self.exclude or self.placement != PLACEMENTS[0]):
            raise StateError("--settings bring the placement along: leave --placement, --include and --exclude out")


@dataclass(frozen=True, slots=True)
class MeasuredOptions(ModelOptions):
    """Which model, and what was measured of it."""

    statistics: Annotated[Path | None, file_option("File of calibrate --out, in the place of --settings.")] = None

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)  # super() knows only the class without slots
        if self.settings is not None and self.statistics is not None:
            raise StateError("--settings bring the statistics along: leave --statistics out")
        if self.settings is None and self.statistics is None:
            raise StateError("no statistics: give --statistics FILE of calibrate, or --settings FILE")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which labelled images, and how many at a time."""

    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            help="Directory of one directory of images per class, of CIFAR's batches, of IDX or .npy files, or .npz "
            "with arrays images and labels (or NAME_images and NAME_labels: --split NAME); see docs/data.md.",
        ),
    ]
    split: Annotated[str | None, typer.Option(help="Subdirectory, IDX prefix (t10k), or name of the arrays.")] = None
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize and crop images of a folder to this side; else as stored, or 224.")
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many, in a fixed shuffled order.")] = None
    skip: Annotated[int, typer.Option(min=0, help="Leave out this many first, for other commands.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128


@dataclass(frozen=True, slots=True)
class AttackOptions:
    """What the attacker may do, and at what pace."""

    eps: Annotated[Any, parsed(parsing.fraction, "EPS", "Radius of the ball: 0.1, 8/255, ...")] = "8/255"
    norm: Annotated[Any, parsed(parsing.name(NORMS), "NORM", "Linf or L2.")] = "Linf"
    attacks: Attacks = _DEFAULT_ATTACKS
    backwards: Annotated[
        Any,
        parsed(parsing.backwards, "NAMES", f"For attacks that name none: {', '.join(SURROGATES)}, smooth-STEEPNESS."),
    ] = "exact,identity"
    steps: Steps = 100
    queries: Queries = 5000
    seed: Seed = 0
    logits: LogitsName = None
    full_rows: Annotated[bool, typer.Option("--full-rows", help="Attack images that are already broken, too.")] = False
    compile: Annotated[
        str | None, typer.Option(metavar="MODE", help="Attack through torch.compile: default, reduce-overhead, ...")
    ] = None
    amp: Amp = None
    checkpoint: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Keep results here; go on from them if killed.")
    ] = None


def with_groups_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with every parameter that is a group replaced by the group's fields, as typer reads them."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    options: list[tuple[str, Any, Any]] = []
    for parameter in inspect.signature(command).parameters.values():
        if (group := groups.get(parameter.name)) is None:
            options.append((parameter.name, hints[parameter.name], parameter.default))
        else:
            types = get_type_hints(group, include_extras=True)
            defaults = {f.name: parameter.empty if f.default is MISSING else f.default for f in fields(group)}
            options += [(name, _under(group, types[name]), default) for name, default in defaults.items()]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)
        for name, hint, default in options
    ]

    def call(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: p.default is not p.empty))  # type: ignore[attr-defined]
    return call


def _under(group: type, hint: Any) -> Any:
    """Return the annotation of a group's field; help shows an option under what the group says it is."""
    shown = copy(hint.__metadata__[0])
    if isinstance(shown, OptionInfo):
        shown.rich_help_panel = (group.__doc__ or "").rstrip(".")
    return Annotated[hint.__origin__, shown]
