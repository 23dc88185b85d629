"""The Triton kernels where there is no GPU: the same source, interpreted on CPU tensors.

Triton reads TRITON_INTERPRET when it is imported, its own library included, so one process cannot both interpret and
compile, and Inductor compiles in this one. `test_interpreted.py` therefore runs the numerics in a process of their
own; with the variable set, or with a GPU, they run here:

    TRITON_INTERPRET=1 pytest tests/kernels
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    collect_ignore = ["test_interpreted.py", "test_codegen.py"]
elif torch.cuda.is_available():
    collect_ignore = ["test_interpreted.py"]
else:
    collect_ignore = [f"test_{name}.py" for name in ("elementwise", "gpu", "moments", "operator", "prologues")]


@pytest.fixture(autouse=True)
def quiet_arithmetic():
    """One thread, since the arrays are tiny; and numpy overflows under the interpreter where a GPU does, silently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: a GPU, or the CPU of the interpreter."""
    return "cpu" if INTERPRETED else "cuda"
