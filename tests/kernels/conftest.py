"""The Triton kernels where there is no GPU: the same source, interpreted on CPU tensors.

Triton decides at decoration whether a function is interpreted, so the variable is set around the first import of
the kernels and put back. With a GPU the same tests run the compiled kernels.
"""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _import_kernels() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        elementwise = importlib.import_module("meansparse_fx.kernels.elementwise")
        importlib.import_module("meansparse_fx.kernels.moments")
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before
    kind = type(elementwise.mean_sparse_forward_kernel).__name__
    assert DEVICE == "cuda" or kind == "InterpretedFunction", f"the kernels were imported before this file: {kind}"


_import_kernels()


@pytest.fixture(autouse=True)
def one_thread():
    """Interpreted kernels work on tiny arrays; the interpreter's numpy overflows where a GPU does, silently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    return DEVICE
