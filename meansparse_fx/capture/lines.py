"""Floor 2: which line of a user's code runs, or failed."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

import torch
from torch import fx, nn

from ..errors import first_line

_HERE, TORCH, _FX = (f"{Path(file).parent}/" for file in (__file__, torch.__file__, fx.__file__))
_DYNAMO = f"{TORCH}_dynamo/"  # around everything that is compiled no more


def source_line(error: BaseException | None = None) -> traceback.FrameSummary:
    """Return the line that runs, or that an error came from: the last of the user's or of a library's, or torch's."""
    everything = list(traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack())
    frames = [f for f in everything if not f.filename.startswith((_HERE, _FX, _DYNAMO, contextlib.__file__))]
    frames = frames or everything
    return ([f for f in frames if not f.filename.startswith(TORCH)] or frames)[-1]


def in_words(line: traceback.FrameSummary) -> str:
    """Return a line as messages name it."""
    return f"{line.filename}:{line.lineno}, `{line.line}`"


def where_tracing_stopped(error: Exception, path: str, module: nn.Module) -> str:
    """Return the module and the line at which a trace failed, and why."""
    where = f"{path} ({type(module).__name__})" if path else type(module).__name__
    reason = first_line(error)
    if any("_functorch" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        reason = "a transform of torch.func, which no graph holds, inside of forward"
    return f"symbolic trace stopped in {where} at {in_words(source_line(error))}: {type(error).__name__}: {reason}"
