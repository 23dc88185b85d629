"""Floor 6: commands about a model alone."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from ..cost import cost as run_cost
from ..transform import inspect as run_inspect
from ..zoo import Normalised, input_shape
from . import parsing
from .loading import console, device_of, open_model, say
from .options import ModelOptions

Shape = Annotated[
    tuple | None,
    typer.Option(
        "--input-shape", parser=parsing.shape, metavar="C,H,W", help="Shape of one image, if not the model's own."
    ),
]


def inspect(model: ModelOptions, shape: Shape = None) -> None:
    """Show every place in MODEL where the operator belongs, and why the others are left alone."""
    net = open_model(model)
    console().print(run_inspect(net, random_images(model, net, shape), model.placement).table())


def cost(model: ModelOptions, shape: Shape = None) -> None:
    """Count the bytes that the operator's forms must move at each site of MODEL, for two images; nothing is timed."""
    net = open_model(model)
    console().print(run_cost(net, random_images(model, net, shape), model.placement).table())


def random_images(options: ModelOptions, net: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    """Return two images ``[2, C, H, W]`` such as the model takes, on its device; an assumed size is printed."""
    if shape is None:
        shape = input_shape(net.model if isinstance(net, Normalised) else net)
        say(f"assumed: images {'x'.join(map(str, shape))} (--input-shape gives another)")
    return torch.rand(2, *shape, device=device_of(options))
