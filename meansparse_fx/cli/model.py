"""Floor 6: commands about a model alone."""

from __future__ import annotations

from typing import Annotated

import typer

from . import parsing
from .options import ModelOptions

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
