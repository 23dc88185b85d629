"""Floor 5: what torch.compile may be given as options of back end ``meansparse``, and the inner back end they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .arguments import half_widths
from .errors import StateError
from .sites import Placement, placement_of
from .statistics import Statistics

_OWN_NAME = "meansparse"

# What a norm returns is computed again for an observer, not kept in memory for it: on a CPU observing costs 1.06 of the
# bundled network's pass then, and 1.6 by Inductor's own threshold of 4 (AMD EPYC, one thread).
_OBSERVING = {"realize_reads_threshold": 12}


@dataclass(frozen=True, slots=True)
class Options:
    """What ``torch.compile(..., options=...)`` may hold.

    Attributes:
        statistics: Of `calibrate` on the same model, or the path of their file.
        alpha: Half width of the band in standard deviations: one number, or by site as for `set_alpha` (else 0).
        placement: Which sites to take, as for `transform`.
        backward: ``exact``, ``identity`` or ``smooth``; compiled in.
        inner: The back end that compiles the rewritten graph: a registered name, or a callable.
        inner_options: Options of that back end.
        mode: Inductor's, such as ``max-autotune``: torch.compile takes either its own ``mode=`` or options.
        allow_missing: Leave out sites without statistics, and accept statistics without a site.
        check_weights: Refuse statistics measured on other weights, or on another function of the same.
        observe: Insert observers instead of operators; `CompileReport.statistics` gives the result.
    """

    statistics: Statistics | str | Path | None = None
    alpha: float | Mapping[str, float] = 0.0
    placement: Placement = field(default_factory=Placement)
    backward: str = "exact"
    inner: str | Callable = "inductor"
    inner_options: Mapping[str, Any] | None = None
    mode: str | None = None
    allow_missing: bool = False
    check_weights: bool = True
    observe: bool = False

    @classmethod
    def read(cls, given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Return the options given to torch.compile, or say which of them does not exist."""
        given = {"mode": mode} | dict(given or {})
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(given.keys() - set(known)):
            raise StateError(
                f"the meansparse back end has no option {unknown[0]!r}; it knows {', '.join(known)}. Options of the "
                "inner back end go into inner_options"
            )
        checked = {"placement": placement_of(given.get("placement")), "alpha": half_widths(given.get("alpha", 0.0))}
        asked = cls(**given | checked)
        if asked.observe and (asked.statistics is not None or asked.alpha != 0):
            raise StateError("option observe measures the base model: leave out statistics and alpha")
        sparsifies = any(asked.alpha.values()) if isinstance(asked.alpha, Mapping) else asked.alpha
        if sparsifies and asked.statistics is None:
            raise StateError(
                f"option alpha is {asked.alpha}, but there are no statistics: pass options={{'statistics': ...}}, the "
                "result of meansparse_fx.calibrate, or measure them with options={'observe': True}"
            )
        return asked


def inner_compiler(asked: Options) -> Callable:
    """Return the back end that compiles rewritten graphs, its options bound."""
    inner: Any = asked.inner
    inner_options = dict(asked.inner_options or {})
    if inner == "inductor":
        return _inductor(_OBSERVING | inner_options if asked.observe else inner_options, asked.mode)
    if asked.mode is not None:
        raise StateError(f"mode={asked.mode!r} is for Inductor, and option inner is {inner!r}: leave one of them out")
    if isinstance(inner, str):
        if inner not in torch.compiler.list_backends(exclude_tags=()) or inner == _OWN_NAME:
            known = ", ".join(name for name in torch.compiler.list_backends(exclude_tags=()) if name != _OWN_NAME)
            raise StateError(f"option inner is {inner!r}, which is no inner back end; there are {known}")
        inner = torch._dynamo.lookup_backend(inner)
    return partial(inner, options=inner_options) if inner_options else inner


def _inductor(options: dict[str, Any], mode: str | None) -> Callable:
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise StateError(f"torch.compile has no mode {mode!r}; it knows {', '.join(modes)}")
    if unknown := sorted(options.keys() - set(torch._inductor.list_options())):
        raise StateError(f"Inductor has no option {unknown[0]!r}; torch._inductor.list_options() has them all")
    compile_graph: Any = torch._dynamo.lookup_backend("inductor")
    return partial(compile_graph, config_patches=(modes[mode] if mode else {}) | options)
