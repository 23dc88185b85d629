"""MeanSparse as a torch.fx compiler pass: find the activations, measure, rewrite, tune, and attack honestly.

What is public is imported when it is first asked for: the command line's help needs no torch, which takes seconds.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import register_activation
    from .alpha import AlphaSearch, select_alpha
    from .backend import compile_report
    from .calibrate import calibrate
    from .cost import Cost, cost
    from .errors import MeanSparseError
    from .evaluate import Evaluation, evaluate, verify
    from .operators import get_alpha, operators, set_alpha, set_backward, set_statistics, set_variant
    from .sites import PLACEMENTS, Placement, Site, SitePlan
    from .statistics import Statistics
    from .transform import inspect, load, load_published, restore, save, transform

__all__ = [
    "PLACEMENTS", "AlphaSearch", "Cost", "Evaluation", "MeanSparseError", "Placement", "Site", "SitePlan", "Statistics",
    "calibrate", "compile_report", "cost", "evaluate", "get_alpha", "inspect", "load", "load_published", "operators",
    "register_activation", "restore", "save", "select_alpha", "set_alpha", "set_backward", "set_statistics",
    "set_variant", "transform", "verify",
]  # fmt: skip


class _Public:
    """A public name of the package, which `public` puts there; a room of the same name does not hide it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, package: ModuleType, _: type) -> Any:
        if self._name not in vars(package):
            import_module(f"{__name__}.public")
        return vars(package)[self._name]

    def __set__(self, package: ModuleType, value: Any) -> None:
        if not isinstance(value, ModuleType):  # rooms are put here by the import system
            vars(package)[self._name] = value


_names: dict[str, Any] = {name: _Public(name) for name in __all__}
_names["__dir__"] = lambda package: sorted(__all__)  # which completion offers, before any of it is imported
sys.modules[__name__].__class__ = type("Package", (ModuleType,), _names)
