"""Floor 5: the package robustbench as the registry has it (1.1.1), on today's Python packages.

What breaks there is replaced here and nowhere else, for as long as that is needed and only where the real thing
is missing. Imported by `robustbench` alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyautoattack
import torch
from torch import Tensor

from ..errors import ModelError


class AutoAttack(pyautoattack.AutoAttack):
    """AutoAttack with the arguments and the result that RobustBench's ``benchmark()`` expects; it writes no log."""

    def __init__(self, *args: Any, log_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def run_standard_evaluation(self, x_orig: Tensor, y_orig: Tensor, *, bs: int, **kwargs: Any) -> Tensor:
        """Return the adversarial images."""
        return super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, **kwargs)[0]


@functools.cache
def library() -> types.ModuleType:
    """Return the package ``robustbench``."""
    with _missing_modules(), warnings.catch_warnings():
        # It imports names that timm has moved, and registers in timm anew what a failed import registered before.
        warnings.simplefilter("ignore")
        try:
            library = importlib.import_module("robustbench")
            importlib.import_module("robustbench.model_zoo.enums")
        except ImportError as error:
            lacks = "is not installed" if error.name == "robustbench" else f"cannot be imported ({error})"
            raise ModelError(f"robustbench {lacks}: pip install 'meansparse_fx[robustbench]'") from error
    return library


@contextlib.contextmanager
def _missing_modules() -> Iterator[None]:
    """Give RobustBench, while it is being imported, two modules that it asks for and does not need."""
    stand_ins: dict[str, types.ModuleType] = {}
    if _lacking("pkg_resources"):
        # Gone from setuptools 81 on. RobustBench asks it for the path of a file of its own.
        stand_ins["pkg_resources"] = types.ModuleType("pkg_resources")
        stand_ins["pkg_resources"].resource_filename = (  # type: ignore[attr-defined]
            lambda package, resource: str(Path(str(sys.modules[package].__file__)).parent / resource)
        )
    if _lacking("autoattack"):
        # On no registry. pyautoattack is the same code under that name, and with another signature.
        stand_ins["autoattack"] = sys.modules[__name__]
        stand_ins["autoattack.state"] = importlib.import_module("pyautoattack.state")
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def _lacking(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is None


@contextlib.contextmanager
def construction() -> Iterator[None]:
    """Let RobustBench's constructors run quietly, and without a GPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # some print what they are
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # names that torch, torchvision and timm deprecate
        if not torch.cuda.is_available():
            # bit_rn.ResNetV2 puts two constants on the GPU; its forward moves them to where the images are.
            stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self))
        yield
