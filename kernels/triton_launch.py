"""A Triton kernel launched again without a look at its arguments: what is not public in Triton's interface is here.

``kernel[grid](...)`` looks at every argument at every call, to find the compiled kernel that serves them: 19 of the 25
microseconds of a launch on the host of an H200. What serves them is decided by the layout, which a `Launch` is made
for, and by the alignment of the pointers. So the first call goes that way, and the next ones hand pointers to what it
returned. Not public are ``run``, ``function`` and ``packed_metadata`` of a compiled kernel, as its own
``compiled[grid]`` uses them, and the driver's ``get_current_stream``; the same in Triton 3.6 and 3.8.

Floor 0, imported only where a kernel is launched: importing this module imports triton.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .layout import INT32_ELEMENTS, OPTIONS, Layout

_ALIGNMENT = 16  # bytes, what Triton compiles for if all pointers have it
_COMPILED: dict[Hashable, Any] = {}
_LOADING = threading.Lock()  # Triton shows a kernel that one thread is loading to others, who would launch nothing yet
_runtime = knobs.runtime


class Launch:
    """One kernel for tensors of one layout; called with the tensors in the order of the kernel's pointers, or None.

    Args:
        kernel: A function under `triton.jit`: pointers, then numbers, then compile-time arguments.
        given: Positions of the pointers that are not None.
        layout, device: Of the tensors.
        numbers: The kernel's arguments after the sizes of the layout.
        constexprs: Compile-time arguments before those of the layout, by name, in order.
    """

    __slots__ = (
        "_constexprs", "_device", "_function", "_given", "_index", "_kernel", "_metadata", "_rest", "_run", "_several",
        "_stream", "_wide_sizes", "grid", "within_2gb",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        given: Sequence[int],
        layout: Layout,
        numbers: tuple[float, ...],
        constexprs: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._given = tuple(given)
        self.grid, self.within_2gb = layout.grid, layout.within_2gb
        self._kernel, self._device, self._index = kernel, device, device.index
        self._constexprs = constexprs | layout.constexprs
        self._rest = (*layout.sizes, *numbers, *self._constexprs.values())
        self._wide_sizes = tuple(size > INT32_ELEMENTS for size in layout.sizes)  # which are other types to Triton
        self._run = None
        self._several = device.type == "cuda" and torch.cuda.device_count() > 1

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the tensors' device."""
        pointers, bits = [None] * len(tensors), 0
        for i in self._given:
            pointers[i] = pointer = tensors[i].data_ptr()
            bits |= pointer
        hook = _runtime.launch_enter_hook  # of Triton's profiler, or of whoever else wants to hear of launches
        hooked = hook is not None and getattr(hook, "calls", True)
        if hooked or bits % _ALIGNMENT or self._run is None:
            self._first(tensors, bits % _ALIGNMENT == 0, hooked)
        elif self._several and torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._device):
                self(*tensors)
        else:
            stream = self._stream(self._index)
            self._run(self.grid, 1, 1, stream, self._function, self._metadata, None, None, None, *pointers, *self._rest)

    def _first(self, tensors: tuple[Tensor | None, ...], aligned: bool, hooked: bool) -> None:
        """Launch as Triton does, which compiles where there is need, and keep what can be called directly from now."""
        with torch.cuda.device_of(next(t for t in tensors if t is not None)):
            dtypes = tuple([t if t is None else t.dtype for t in tensors])
            values = tuple(self._constexprs.values())
            key = self._kernel, dtypes, values, self._device, self._wide_sizes, self.within_2gb
            found = _COMPILED.get(key) if aligned and not hooked else None
            compiled = found or self._by_triton(tensors)
            if not aligned or not hasattr(compiled, "run"):  # interpreted kernels return nothing
                return
            _COMPILED[key] = compiled
            self._function, self._metadata = compiled.function, compiled.packed_metadata
            self._stream = driver.active.get_current_stream
            self._run = compiled.run  # last: from here on other threads use all of them
            if found:
                self(*tensors)

    def _by_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """Launch as Triton does, and return the compiled kernel.

        Raises:
            RuntimeError: A CUDA graph is being captured, and the kernel was never called before.
        """
        numbers = self._rest[: len(self._rest) - len(self._constexprs)]
        try:
            with _LOADING:
                return self._kernel[(self.grid,)](*tensors, *numbers, **self._constexprs, **OPTIONS)
        except RuntimeError as error:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a kernel is loaded by its first call, which CUDA does not permit while a graph is captured: call "
                    "the model once on such inputs before capturing it"
                ) from error
            raise
