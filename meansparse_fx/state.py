"""Floor 1: parameters, buffers and random numbers, and what running a model does to them. Imports torch only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, fx, nn


def state_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the parameters and buffers of ``model`` by name, all or those called so."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return state if names is None else {name: state[name] for name in names if name in state}


@contextmanager
def kept_parameters(model: nn.Module) -> Iterator[list[str]]:
    """Undo what a model does that assigns to ``parameter.data``, or fills ``parameter.grad``.

    Yields:
        A list: in the end the names of those, and of plain attributes that have other values now.
    """
    before = [(name, p, p.data, p.grad) for name, p in model.named_parameters()]
    plain = [(m, k, v) for m in model.modules() for k, v in vars(m).items() if type(v) in (bool, int, float, str)]
    reassigned: list[str] = []
    for _, parameter, *_ in before:
        parameter.grad = None
    try:
        yield reassigned
    finally:
        for name, parameter, data, grad in before:
            parameter.grad = grad
            if not (parameter.is_meta or parameter.data.is_set_to(data)):
                parameter.data = data
                reassigned.append(name)
        reassigned += [name for module, name, value in plain if vars(module).get(name) != value]


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what running a model does to its buffers, such as counters."""
    held = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    before = [(holder, name, b, _in_memory(b).clone()) for holder, name, b in held if not b.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for holder, name, buffer, value in before:
                _in_memory(buffer).copy_(value)
                holder[name] = buffer


def kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Undo what is drawn of torch's random numbers, of the CPU and of ``device``."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _in_memory(tensor: Tensor) -> Tensor:
    """Return a view without what an expanded tensor repeats: nobody may write to that."""
    repeats = tensor.stride() if tensor.layout is torch.strided else ()
    return tensor[tuple(slice(None if stride else 1) for stride in repeats)] if 0 in repeats else tensor


def write_buffers_back(graph: fx.Graph, root: nn.Module, names: set[str]) -> None:
    """Let buffers that a traced forward assigned to have their new values once the graph has run.

    Until then it reads the old ones.

    Args:
        root: The module that was traced, with proxies where it was assigned to.
        names: Of its state before.
    """
    for path, module in root.named_modules():
        for name, value in module._buffers.items():
            target = f"{path}.{name}".lstrip(".")
            if target not in names or not isinstance(value, fx.Proxy) or value.node.target == target:
                continue
            for old in graph.find_nodes(op="get_attr", target=target):
                with graph.inserting_after(old):
                    kept = graph.call_method("clone", (old,))
                old.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
            with graph.inserting_before(graph.output_node()):
                new = graph.call_method("detach", (value.node,))
                graph.call_method("copy_", (graph.get_attr(target), new))
