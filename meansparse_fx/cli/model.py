"""Floor 6: commands about a model alone."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from ..transform import inspect as run_inspect
from ..zoo import Normalised, input_shape
from . import parsing
from .loading import console, device_of, open_model
from .options import ModelOptions


def inspect(
    model: ModelOptions,
    shape: Annotated[
        tuple | None,
        typer.Option(
            "--input-shape", parser=parsing.shape, metavar="C,H,W", help="Shape of one image, if not the model's own."
        ),
    ] = None,
) -> None:
    """Show every place in MODEL where the operator belongs, and why the others are left alone."""
    net = open_model(model)
    shape = shape or input_shape(net.model if isinstance(net, Normalised) else net)
    console().print(run_inspect(net, torch.rand(2, *shape, device=device_of(model))).table())
