"""Floor 1: what a model returns: one tensor, or tensors in a container, whose type is a part of the result.

Containers are tuples, lists, dicts, named tuples, dataclasses, and classes of dicts such as OrderedDict and
transformers' ModelOutput, which is a dataclass as well. Imports torch and errors only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import EvaluationError

Logits = str | int | Callable[[Any], Tensor] | None
NAMES = ("logits", "out")  # where logits are if nobody says so: transformers' name, and torchvision's for segmentation


def parts(value: Any) -> dict[Any, Any] | None:
    """Return what a container holds, by name or position; None if it is none."""
    if isinstance(value, type | Tensor):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return None


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Return what the containers of a result hold in the end, and their form: equal forms are the same containers."""
    found = parts(value)
    if found is None:
        return [value], None
    inner = [flatten(part) for part in found.values()]
    form = type(value), tuple(found), tuple(form for _, form in inner)
    return [leaf for leaves, _ in inner for leaf in leaves], form


def names(value: Any) -> list[str]:
    """Return a name for everything that `flatten` finds: ``logits``, ``hidden_states.0``."""
    if (found := parts(value)) is None:
        return [""]
    return [f"{name}.{inner}".rstrip(".") for name, part in found.items() for inner in names(part)]


def kind(value: Any) -> str:
    """Return what a result is, in words: its type, and the names of what it holds."""
    found = parts(value)
    if found is None:
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    held = ", ".join(str(name) for name, part in found.items() if part is not None)
    return f"{type(value).__name__} of {held or 'nothing'}"


def difference(actual: Any, expected: Any) -> str:
    """Return in what two outputs differ, in words; nothing if they agree bit for bit, NaN being equal to NaN."""
    (leaves, form), (others, other_form) = flatten(actual), flatten(expected)
    if form != other_form:
        return f"returns {kind(actual)} where the model returns {kind(expected)}"
    for a, b in zip(leaves, others, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if (a is not b and type(a) is not type(b)) or a != b:
                return f"returns {kind(a)} where the model returns {kind(b)}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"returns {kind(a)} where the model returns {kind(b)}"
        elif not same_values(a.to_dense(), b.to_dense()):
            return "computes something else than the model"
    return ""


def same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype hold equal values, NaN being equal to NaN alone."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def logits_in(output: Any, logits: Logits = None) -> Tensor:
    """Return the logits in what a model returns.

    Args:
        output: A tensor is them itself, unless ``logits`` is a function.
        logits: Their name or position in the container, or a function of it. By default one of `NAMES`, or the only
            tensor there is.

    Raises:
        EvaluationError: They are not there; says what is.

    Example:
        >>> import torch
        >>> logits_in({"out": torch.zeros(2, 5), "aux": torch.zeros(2, 5)}).shape
        torch.Size([2, 5])
    """
    held = parts(output) or {}
    tensors = {name: part for name, part in held.items() if isinstance(part, Tensor)}
    found: Any
    if callable(logits):
        found = logits(output)
    elif isinstance(output, Tensor):
        found = output
    elif logits is None:
        known = [tensors[name] for name in NAMES if name in tensors]
        found = known[0] if known else next(iter(tensors.values())) if len(tensors) == 1 else None
    else:
        by_position: dict[Any, Any] = dict(enumerate(part for part in held.values() if part is not None))
        found = held.get(logits, by_position.get(logits))
    if not isinstance(found, Tensor):
        asked = "" if logits is None else f", and logits={logits!r} is no tensor in it"
        raise EvaluationError(
            f"the model returns {kind(output)}{asked}: say which of them are the logits, logits=NAME, a position, or a "
            "function of what it returns"
        )
    return found


def in_words(logits: Logits) -> str | None:
    """Return where logits are, as files keep it; None if nobody said."""
    return None if logits is None else str(getattr(logits, "__qualname__", logits))


def logits_of(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the model's logits ``[N, K]``, or ``[N, K, H, W]`` if labels are maps, refusing anything else."""
    logits = model(images)
    size = [] if labels is None else list(labels.shape[1:])
    if not isinstance(logits, Tensor) or logits.dim() != 2 + len(size) or len(logits) != len(images):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"expected logits [N, classes{', H, W' if size else ''}] from the model, got {shape}")
    if list(logits.shape[2:]) != size:
        raise EvaluationError(
            f"logits of {list(logits.shape[2:])} pixels for label maps of {size}: bring them to the maps' size inside "
            "the model, with F.interpolate(logits, size, mode='bilinear'), so that attacks see it"
        )
    if not logits.isfinite().all():
        raise EvaluationError("the model's logits hold NaN or inf: accuracy under attack would mean nothing")
    return logits
