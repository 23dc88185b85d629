"""Functions compiled by Inductor for the CPU, and called without Dynamo.

Dynamo's guards and the rebuilding of results cost 60 microseconds a call on two threads of an AMD EPYC, several times
what a small kernel takes; without guards, by torch.compile's option ``guard_filter_fn``, it is 51. Here a function is
traced with symbolic sizes and given to Inductor directly, which takes 7. One tuple asks what guards would ask: dtypes,
which arguments are missing, which sizes are 0, 1 or equal, the number of threads.

Floor 0: torch and nothing else.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

_LOGGER = logging.getLogger("meansparse_fx.kernels")
_LOCK = threading.Lock()  # tracing has state of its own

Call = Callable[[Sequence[Tensor | None]], Sequence[Tensor]]


class Unguarded:
    """A function of tensors, all of its sizes dynamic; where compiling fails it is called as it is.

    Args:
        plain: Takes tensors or None, dense ones without overlap; returns a tuple of tensors, fresh ones.
        name: For the log.
    """

    def __init__(self, plain: Callable[..., Sequence[Tensor]], name: str) -> None:
        self._plain, self._name = plain, name
        self._calls: dict[Hashable, Call] = {}

    def __call__(self, *arguments: Tensor | None) -> Sequence[Tensor]:
        """Return ``plain(*arguments)``."""
        return self.compiled_for(arguments)(arguments)

    def compiled_for(self, arguments: Sequence[Tensor | None]) -> Call:
        """Return the function of all arguments of one kind with these."""
        case = _case_of(arguments)
        with _LOCK:
            if case not in self._calls:
                self._calls[case] = self._compile(arguments)
        return self._calls[case]

    def _compile(self, arguments: Sequence[Tensor | None]) -> Call:
        if not all(t is None or t.numel() for t in arguments):  # nothing to compute
            return lambda arguments: self._plain(*arguments)
        _LOGGER.info("compiling the CPU kernel %s", self._name)
        given = [i for i, t in enumerate(arguments) if t is not None]

        def of_tensors(*tensors: Tensor) -> Sequence[Tensor]:
            following = iter(tensors)
            return self._plain(*[None if t is None else next(following) for t in arguments])

        try:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                examples = [torch.zeros_like(t, requires_grad=False) for t in arguments if t is not None]
                graph = make_fx(of_tensors, tracing_mode="symbolic")(*examples)
                fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
                compiled = torch._inductor.compile(graph, fakes)
                compiled(*examples)  # a broken toolchain may show only here
        except Exception as error:
            warnings.warn(f"compiling the CPU kernel failed, using torch operators: {error}", stacklevel=2)
            return lambda arguments: self._plain(*arguments)
        return lambda arguments: compiled(*[arguments[i] for i in given])


def _case_of(arguments: Sequence[Tensor | None]) -> Hashable:
    """Return what guards would tell apart."""
    sizes = [0, 1, *(size for t in arguments if t is not None for size in t.shape)]
    dtypes = [t if t is None else t.dtype for t in arguments]
    return torch.get_num_threads(), tuple(map(sizes.index, sizes)), *dtypes
