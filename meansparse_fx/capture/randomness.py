"""Floor 2: random numbers that no graph draws anew: Python's, NumPy's, and those of torch that a branch hangs on."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CaptureError

SEEDS = 20  # what happens once in ten runs is missed once in eight


@contextmanager
def put_back() -> Iterator[Callable[[], bool]]:
    """Undo what is drawn meanwhile; yield what tells whether anything was."""
    # In Python's annotations NumPy need not be there; torch imports it where it is.
    numpy: Any = sys.modules.get("numpy")
    before = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield lambda: random.getstate() != before[0] or (numpy and repr(numpy.random.get_state()) != repr(before[1]))
    finally:
        random.setstate(before[0])
        if numpy:
            numpy.random.set_state(before[1])


def check_unused(run: Callable[[], Any], differ: Callable[[Any, Any], str | None]) -> None:
    """Raise CaptureError if what ``run`` returns hangs on them.

    Args:
        differ: Says how two results differ, if they do.
    """
    numpy: Any = sys.modules.get("numpy")
    first = None
    with put_back():
        for seed in range(SEEDS):
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            result = run()
            first = result if first is None else first
            if differ(result, first):
                raise CaptureError(
                    "forward draws random numbers of Python or NumPy, and a graph would repeat the first: draw them "
                    "with torch"
                )


def check_drawn_anew(
    model: Callable[..., Any], graph: Callable[..., Any], differ: Callable[[Any, Any], str | None]
) -> None:
    """Raise CaptureError if a graph repeats what torch's random numbers were when it was traced.

    Args:
        model, graph: Run under torch's generators at ``seed``.
        differ: Says how two results differ, if they do.
    """
    if any(differ(graph(seed=seed), model(seed=seed)) for seed in range(1, SEEDS)):
        raise CaptureError(
            "forward makes a Python number, a branch or a constant of random numbers of torch, and a graph would "
            "repeat the first: keep them in tensors that have the images' batch, as torch.rand_like does"
        )
