"""Floor 2: random numbers that no graph draws anew: Python's, NumPy's, and those of torch that a branch hangs on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import CaptureError

SEEDS = 20  # what happens once in ten runs is missed once in eight


@contextmanager
def put_back() -> Iterator[Callable[[], bool]]:
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


def check_unused(run: Callable[[], Any], differ: Callable[[Any, Any], str]) -> None:
    """Raise CaptureError if what ``run`` returns hangs on Python's or NumPy's numbers, which are drawn from.

    Args:
        differ: Says how two results differ; nothing if they do not.
    """
    first = None
    for seed in range(SEEDS):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        result = run()
        first = result if first is None else first
        if differ(result, first):
            raise CaptureError(
                "forward draws random numbers of Python or NumPy, and a graph would repeat the first: draw them "
                "with torch"
            )


def check_drawn_anew(model: Callable[..., Any], graph: Callable[..., Any], differ: Callable[[Any, Any], str]) -> None:
    """Raise CaptureError if a graph repeats what torch's random numbers were when it was traced.

    Args:
        model, graph: Run under torch's generators at ``seed``.
        differ: Says how two results differ; nothing if they do not.
    """
    if any(differ(graph(seed=seed), model(seed=seed)) for seed in range(1, SEEDS)):
        raise CaptureError(
            "forward makes a Python number, a branch or a constant of random numbers of torch, and a graph would "
            "repeat the first: keep them in tensors that have the images' batch, as torch.rand_like does"
        )
