"""Floor 6: commands about a model alone, and a transformed one as a file for deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import meansparse_fx as msfx

from ..names import FORMATS
from . import parsing
from .options import Alpha, MeasuredOptions, ModelOptions, parsed

Shape = Annotated[
    tuple | None, parsed(parsing.shape, "C,H,W", "Shape of one image, if not the model's own.", "--input-shape")
]


def inspect(model: ModelOptions, shape: Shape = None) -> None:
    """Show every place in MODEL where the operator belongs, and why the others are left alone."""
    from . import loading

    net = loading.open_model(model)
    images = loading.random_images(model, net, shape)
    loading.console().print(msfx.inspect(net, images, loading.chosen_placement(model)).table())


def cost(model: ModelOptions, shape: Shape = None) -> None:
    """Count the bytes that the operator's forms must move at each site of MODEL, for two images; nothing is timed."""
    from . import loading

    net = loading.open_model(model)
    images = loading.random_images(model, net, shape)
    loading.console().print(msfx.cost(net, images, loading.chosen_placement(model)).table())


def export(
    model: MeasuredOptions,
    out: Annotated[Path, typer.Option(help="File to write: .pt2, or .onnx.")],
    alpha: Alpha = None,
    format: Annotated[
        Any, parsed(parsing.name(FORMATS), "FORMAT", f"Of {', '.join(FORMATS)}: see docs/export.md.")
    ] = "export",
    shape: Shape = None,
    fixed_batch: Annotated[
        int | None, typer.Option(min=1, help="Take exactly this many images at a time; otherwise any number.")
    ] = None,
) -> None:
    """Write MODEL for deployment, with its statistics and alpha baked in; the file runs without this package."""
    from .. import export as room
    from ..report import describe_alpha
    from . import loading
    from .robustness import put_alpha

    room.require_file(out, format)
    net = loading.open_model(model)
    images = loading.random_images(model, net, shape)
    sparse = loading.transformed(model, net, images)
    put_alpha(sparse, alpha)
    example = images[[0] * (fixed_batch or len(images))]
    room.export(sparse, example, out, format, dynamic_batch=fixed_batch is None)
    words = describe_alpha(msfx.get_alpha(sparse))
    if msfx.get_alpha(sparse) == 0:
        words += ", the base itself"
    loading.console().print(f"{format}, {words}, {out.stat().st_size / 2**20:.1f} MiB: {out}", highlight=False)
