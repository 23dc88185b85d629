"""Floor 6: commands about a model alone, and a transformed one as a file for deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..names import FORMATS
from . import parsing
from .options import Alpha, MeasuredOptions, ModelOptions, one_of

Shape = Annotated[
    tuple | None,
    typer.Option(
        "--input-shape", parser=parsing.shape, metavar="C,H,W", help="Shape of one image, if not the model's own."
    ),
]


def inspect(model: ModelOptions, shape: Shape = None) -> None:
    """Show every place in MODEL where the operator belongs, and why the others are left alone."""
    from ..transform import inspect
    from .loading import chosen_placement, console, open_model, random_images

    net = open_model(model)
    console().print(inspect(net, random_images(model, net, shape), chosen_placement(model)).table())


def cost(model: ModelOptions, shape: Shape = None) -> None:
    """Count the bytes that the operator's forms must move at each site of MODEL, for two images; nothing is timed."""
    from ..cost import cost
    from .loading import chosen_placement, console, open_model, random_images

    net = open_model(model)
    console().print(cost(net, random_images(model, net, shape), chosen_placement(model)).table())


def export(
    model: MeasuredOptions,
    out: Annotated[Path, typer.Option(help="File to write: .pt2, or .onnx.")],
    alpha: Alpha = None,
    format: Annotated[Any, one_of(FORMATS, "FORMAT", f"Of {', '.join(FORMATS)}: see docs/export.md.")] = "export",
    shape: Shape = None,
    fixed_batch: Annotated[
        int | None, typer.Option(min=1, help="Take exactly this many images at a time; otherwise any number.")
    ] = None,
) -> None:
    """Write MODEL for deployment, with its statistics and alpha baked in; the file runs without this package."""
    from .. import export as room
    from ..statistics import Statistics
    from .loading import console, open_model, random_images, say, transformed
    from .robustness import put_alpha

    room.require_file(out, format)
    calibrated = Statistics.load(model.measured).metadata.get("image_shape", "").split(" + ")[0]
    if shape is None and calibrated:
        shape = parsing.shape(calibrated)
        say(f"images {calibrated}, as in calibration (--input-shape gives another)")
    net = open_model(model)
    images = random_images(model, net, shape)
    sparse = transformed(model, net, images)
    put_alpha(sparse, alpha)
    example = images[[0] * (fixed_batch or len(images))]
    room.export(sparse, example, out, format, dynamic_batch=fixed_batch is None)
    console().print(f"{format}, {out.stat().st_size / 2**20:.1f} MiB: {out}")
