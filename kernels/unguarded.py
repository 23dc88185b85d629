"""Functions compiled by Inductor for the CPU, and called without Dynamo.

Dynamo's guards and the rebuilding of results cost 60 microseconds a call on two threads of an AMD EPYC, several times
what a small kernel takes; without guards, by torch.compile's option ``guard_filter_fn``, it is 51, and what follows
takes 7. Here Dynamo calls a function once for each kind of arguments; what it called then is called
directly from the second time on. One tuple asks what the guards asked: dtypes, which arguments are missing, which
sizes are 0, 1 or equal, the number of threads. What does not fit that scheme stays with Dynamo.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

_LOGGER = logging.getLogger("meansparse_fx.kernels")


class CompiledCall(NamedTuple):
    """What Dynamo called for one kind of arguments.

    Attributes:
        compiled: Takes sizes and tensors, returns a sequence of tensors.
        order: Where each of its arguments comes from: a position among the function's own, and a dimension, or None
            for the tensor itself.
    """

    compiled: Callable[..., Sequence[Tensor]]
    order: list[tuple[int, int | None]]

    def bound(self, arguments: Sequence[Tensor | None]) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor]]:
        """Return the function's call for arguments of the sizes of these."""
        sources = [(i, None if d is None else arguments[i].shape[d]) for i, d in self.order]
        compiled = self.compiled
        return lambda given: compiled(*[given[i] if size is None else size for i, size in sources])


class Unguarded:
    """A function of tensors, all of its sizes dynamic; where compiling fails it is called as it is.

    Args:
        plain: Takes tensors or None, dense ones without overlap; returns a tuple of tensors, fresh ones.
        name: Of its code, for whoever profiles.
    """

    def __init__(self, plain: Callable[..., Sequence[Tensor]], name: str) -> None:
        self._plain, self._name = plain, name
        self._calls: dict[Hashable, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *arguments: Tensor | None) -> Sequence[Tensor]:
        """Return ``plain(*arguments)``."""
        case = _case_of(arguments)
        call = self._calls.get(case)
        if call is None:
            _LOGGER.info("compiling the CPU kernel %s", self._name)
            self._calls[case] = call = _OneCase(self._plain, self._name)
        return call(*arguments)

    def direct(
        self, arguments: Sequence[Tensor | None]
    ) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor]] | None:
        """Return the call for arguments of the sizes of these that passes Dynamo by, if there is one by now."""
        case = self._calls.get(_case_of(arguments))
        return None if case is None or case.compiled_call is None else case.compiled_call.bound(arguments)


def _case_of(arguments: Sequence[Tensor | None]) -> Hashable:
    """Return what Dynamo's guards would tell apart."""
    sizes: list[int] = [0, 1]
    kinds: list[Hashable] = []
    for t in arguments:
        if t is None:
            kinds.append(None)
        else:
            sizes += t.shape
            kinds.append(t.dtype)
    return torch.get_num_threads(), tuple(map(sizes.index, sizes)), *kinds


class _OneCase:
    """The function for one kind of arguments: Dynamo's, until it is known what that called."""

    def __init__(self, plain: Callable[..., Sequence[Tensor]], name: str) -> None:
        def call(*arguments):
            return plain(*arguments)

        # Dynamo keeps its cache, and counts recompilations, by code object: give each case its own.
        call.__code__ = call.__code__.replace(co_name=name)
        self._plain, self._seen = plain, threading.local()
        self._compiled = torch.compile(call, backend=self._backend, dynamic=True, fullgraph=True)
        self.compiled_call: CompiledCall | None = None

    def __call__(self, *arguments: Tensor | None) -> Sequence[Tensor]:
        if self.compiled_call is not None:
            return self.compiled_call.bound(arguments)(arguments)
        if self._compiled is None:
            return self._plain(*arguments)
        self._seen.call = None
        detached = [t if t is None else t.detach() for t in arguments]
        try:
            with torch.no_grad():
                results = self._compiled(*detached)
        except Exception as error:  # a broken toolchain shows only here
            warnings.warn(f"compiling the CPU kernel failed, using torch operators: {error}", stacklevel=2)
            self._compiled = None
            return self._plain(*arguments)
        self.compiled_call = self._find_call(detached, results)
        return results

    def _backend(self, graph: fx.GraphModule, examples: Sequence) -> Callable:
        from torch._dynamo import lookup_backend

        compiled = lookup_backend("inductor")(graph, examples)
        placeholders = [node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")]

        def call(*given):
            found = compiled(*given)
            self._seen.call = compiled, placeholders, given, found
            return found

        return call

    def _find_call(self, arguments: Sequence[Tensor | None], results: Sequence[Tensor]) -> CompiledCall | None:
        """Return the call that Dynamo made; None if that cannot be told, or if it made more of the results."""
        if self._seen.call is None:
            return None
        compiled, placeholders, given, found = self._seen.call
        self._seen.call = None
        if len(found) != len(results) or any(a is not b for a, b in zip(found, results, strict=True)):
            return None
        positions = {id(t): i for i, t in enumerate(arguments) if t is not None}
        sizes: dict[str, tuple[int, int]] = {}
        for fake, own in zip(placeholders, given, strict=True):
            if isinstance(fake, Tensor) and id(own) in positions:
                for dim, size in enumerate(fake.shape):
                    sizes.setdefault(str(size), (positions[id(own)], dim))
        order: list[tuple[int, int | None] | None] = [
            ((positions[id(own)], None) if id(own) in positions else None)
            if isinstance(own, Tensor)
            else sizes.get(str(fake))
            for fake, own in zip(placeholders, given, strict=True)
        ]
        known = [source for source in order if source is not None]
        return CompiledCall(compiled, known) if len(known) == len(order) else None
