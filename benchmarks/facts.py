"""What is known of a call beside its time: memory, what it launches, what its compiler made of it."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from meansparse_fx.cost.tally import Tally, kept_bytes
from meansparse_fx.kernels import autograd, operator

from .harness import Call


def launches(call: Call, device: str, compiled: bool) -> int | None:
    """Return how many kernels a call launches on a GPU, operators it calls on a CPU; None there if it is compiled."""
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in found.events() if e.device_type == DeviceType.CUDA]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
    if compiled:
        return None  # a counting mode would run the graph as it was before it was compiled
    with Tally() as tally, _operators_counted_as_one(tally):
        call()
    return tally.calls


@contextmanager
def _operators_counted_as_one(tally: Tally) -> Iterator[None]:
    """Let a run of the operator count as one call, not as what the reference is made of, which a mode gets to see."""

    def counted(run: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            tally.calls += 1
            with _disable_current_modes():
                return run(*args)

        return call

    patch, runs = mock.patch.multiple, {name: counted(getattr(operator.Call, name)) for name in ("forward", "backward")}
    nobody = {"is_observed": lambda *_: False}
    with patch(operator, **nobody), patch(autograd, **nobody), patch(operator.Call, **runs):
        yield


def peak_bytes(call: Call, device: str) -> int:
    """Return the most memory that a call has allocated at one time, over what was allocated before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def facts_of(
    call: Call, graph: Call | None, state: Callable[[], Iterable[Tensor]], device: str, compiled: bool, cold: bool
) -> dict[str, Any]:
    """Return columns of a contender's row; its first call compiles it, if it is to be compiled.

    Args:
        call: What is timed.
        graph: The part of it that backward would start from; None where no gradient is taken.
        state: Returns the tensors that are there anyway, asked once it is compiled.
        cold: Caches on disk are off, so that the seconds of the first call mean something.
    """
    counters.clear()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {
        "kept_bytes": None if graph is None else kept_bytes(graph, state()),
        "peak_bytes": peak_bytes(call, device),
        "launches": launches(call, device, compiled),
        "graphs": counters["stats"]["unique_graphs"] if compiled else None,
        "compile_seconds": seconds if compiled and cold else None,
    }
