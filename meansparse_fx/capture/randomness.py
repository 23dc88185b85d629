"""Floor 2: random numbers that no graph draws anew: Python's, NumPy's, and those of torch that a branch hangs on."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..dataless import NeedsData, tensors
from ..errors import CaptureError
from ..outputs import difference

SEEDS = 20  # what happens once in ten runs is missed once in eight


@contextmanager
def undone_draws() -> Iterator[Callable[[], bool]]:
    """Undo what is drawn of Python's and NumPy's numbers meanwhile; yield what tells whether anything was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, forward may draw from just this one
    before = _compared(python, numpy)
    try:
        yield lambda: _compared(random.getstate(), np.random.get_state()) != before  # noqa: NPY002
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _compared(python: Any, numpy: Any) -> tuple:
    kind, keys, *rest = numpy
    return python, kind, keys.tobytes(), rest


def generator_state(device: torch.device) -> bytes:
    """Return what torch's random numbers on a device follow from."""
    home: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    state = home.get_rng_state() if device.type == "cpu" else home.get_rng_state(device)
    return state.numpy().tobytes()


def draws(func: Any, args: tuple, kwargs: dict) -> bool:
    """Return whether an operator call draws random numbers of torch; attention does for its dropout alone."""
    if not _is_random(func):
        return False
    rates = [(i, a) for i, a in enumerate(func._schema.arguments) if a.name == "dropout_p"]
    return not rates or any((args[i] if i < len(args) else kwargs.get(a.name, a.default_value)) > 0 for i, a in rates)


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def state_drawn_from(args: tuple, kwargs: dict) -> bytes:
    """Return what the numbers of a random call follow from, and move on: seeding is no operator call."""
    if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
        raise NeedsData("random numbers of a generator of its own")
    device = torch.device(kwargs.get("device") or next((t.device for t in tensors((args, kwargs))), "cpu"))
    state = generator_state(device)
    torch.rand((), device=device)
    return state


def check_unused(run: Callable[[], Any]) -> None:
    """Raise CaptureError if what ``run`` returns hangs on Python's or NumPy's numbers, which are drawn from."""
    first = None
    for seed in range(SEEDS):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        result = run()
        first = result if first is None else first
        if difference(result, first):
            raise CaptureError(
                "forward draws random numbers of Python or NumPy, and a graph would repeat the first: draw them "
                "with torch"
            )


def check_drawn_anew(model: Callable[..., Any], graph: Callable[..., Any]) -> None:
    """Raise CaptureError if a graph repeats torch's random numbers of its trace; both run at the ``seed`` given."""
    if any(difference(graph(seed=seed), model(seed=seed)) for seed in range(1, SEEDS)):
        raise CaptureError(
            "forward makes a Python number, a branch or a constant of random numbers of torch, and a graph would "
            "repeat the first: keep them in tensors that have the images' batch, as torch.rand_like does"
        )
