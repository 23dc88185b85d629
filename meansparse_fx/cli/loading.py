"""Floor 6: from options to what the verbs take: the model, the transformed model, the images; and the console."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, fx, nn

from ..data import ImageSet, load_images
from ..errors import ModelError, first_line
from ..evaluate.plan import plan_runs
from ..evaluate.threat import AttackSettings
from ..outputs import Logits, logits_in
from ..settings import Settings
from ..sites import Placement, placement_of
from ..statistics import Statistics
from ..tables import terminal_width
from ..transform import transform
from ..zoo import Normalised, input_shape, load_model
from . import parsing
from .options import AttackOptions, DataOptions, MeasuredOptions, ModelOptions

Options = TypeVar("Options", bound=ModelOptions)


def console() -> Console:
    """Return the console for results: standard output, as wide as the terminal, or as COLUMNS or a table wants it."""
    return Console(width=terminal_width())


def say(text: str) -> None:
    """Print a remark on standard error."""
    Console(stderr=True, soft_wrap=True).print(text, style="dim", markup=False, highlight=False)


def device_of(options: ModelOptions) -> torch.device:
    """Return the device asked for, by default a GPU if there is one; raise ModelError if it cannot be used."""
    name = options.device
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ModelError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    return device


def open_model(options: ModelOptions) -> nn.Module:
    """Return the model in eval mode on its device, normalising inside if asked to."""
    device = device_of(options)
    model = load_model(options.model, options.weights, options.num_classes)
    if options.normalise is not None:
        model = Normalised(model, *options.normalise)
    return model.eval().to(device)


def chosen_placement(options: ModelOptions) -> Placement:
    """Return which sites to take."""
    if options.settings is not None:
        return Settings.load(options.settings).placement
    own, include, exclude = placement_of(options.placement), options.include or (), options.exclude or ()
    return replace(own, include=(*own.include, *include), exclude=(*own.exclude, *exclude))


def transformed(options: ModelOptions, net: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the model transformed as its settings file or the options say; ``images`` are ``[N, C, H, W]``."""
    if options.settings is not None:
        return transform(net, images, settings=options.settings)
    statistics = options.statistics if isinstance(options, MeasuredOptions) else None
    return transform(net, images, placement=chosen_placement(options), statistics=statistics)


def open_images(data: DataOptions) -> ImageSet:
    """Return the images asked for, and say on standard error which those are."""
    found = load_images(data.data, data.split, image_size=data.image_size, limit=data.limit, skip=data.skip)
    say(f"images: {found.description}")
    return found


def open_sparse(options: ModelOptions, data: DataOptions, logits: Logits = None) -> tuple[ImageSet, fx.GraphModule]:
    """Return the images as the model takes them, and the model as `transformed` does.

    Gray images of a folder become one channel where the model takes one. The model's logits are checked against the
    labels, if it is clear which they are.
    """
    images = open_images(data)
    net, device = open_model(options), device_of(options)
    examples = first_images(images, 2, device)
    if examples.shape[1] == 3 and any(isinstance(m, nn.Conv2d) and m.in_channels == 1 for m in net.modules()):
        try:
            with torch.no_grad():
                net(examples)
        except RuntimeError:
            images = images.gray()
            examples = first_images(images, 2, device)
            say("images are gray, as one channel: what the model takes")
    sparse = transformed(options, net, examples)
    with torch.no_grad():
        output = sparse(examples)
    if isinstance(options, MeasuredOptions) or isinstance(output, Tensor):
        images.check_labels(logits_in(output, logits).shape[1])
    return images, sparse


def first_images(images: ImageSet, count: int, device: torch.device) -> Tensor:
    """Return the first images ``[count, C, H, W]`` on ``device``, or as many as there are."""
    return torch.stack([images[i][0] for i in range(min(count, len(images)))]).to(device)


def random_images(options: ModelOptions, net: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    """Return two images ``[2, C, H, W]`` such as the model takes, on its device; an assumed size is printed."""
    if shape is None:
        file = options.settings or (options.statistics if isinstance(options, MeasuredOptions) else None)
        known = "" if file is None else Statistics.load(file).metadata.get("image_shape", "").split(" + ")[0]
        shape = parsing.shape(known) if known else input_shape(net.model if isinstance(net, Normalised) else net)
        words = f"images {known}, as in calibration" if known else f"assumed: images {'x'.join(map(str, shape))}"
        say(f"{words} (--input-shape gives another)")
    return torch.rand(2, *shape, device=device_of(options))


def estimate(images: ImageSet, batch_size: int, work: Callable[[list[Any]], object], warm: bool = False) -> None:
    """Do one batch and print how long all images would take; ``warm``: what is only done once is done before."""
    first = next(iter(images.loader(batch_size)))
    say(f"dry run: one batch of {len(first[1])} images, all that would be done to it")
    if warm:
        work([first])
    began = time.monotonic()
    work([first])
    seconds, count = time.monotonic() - began, len(first[1])
    whole = timedelta(seconds=round(seconds * len(images) / count))
    console().print(f"dry run: {seconds:.2f} s for {count} images, so about {whole} for {len(images)}", highlight=False)


def check_attacks(attack: AttackOptions) -> None:
    """Raise EvaluationError, before a model is loaded, where attacks do not go together."""
    AttackSettings(attack.eps, attack.norm)
    plan_runs(attack.attacks, attack.backwards, attack.seed)


def join_processes(model: Options) -> tuple[Options, Any]:
    """Return the model on this process's device, and the process group if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return model, None
    gpu = torch.cuda.is_available() and (model.device or "cuda").startswith("cuda")
    if gpu:
        model = replace(model, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(model.device)
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    return model, torch.distributed.group.WORLD


def leave_processes(group: Any) -> bool:
    """Leave the group, if there is one, once all have come here; return whether this is the process that reports."""
    if group is None:
        return True
    torch.distributed.barrier()
    first = group.rank() == 0
    torch.distributed.destroy_process_group()
    return first
