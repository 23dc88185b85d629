"""Floor 5: what belongs to a compiled model as a whole, over all the graphs that Dynamo makes of it.

`CompileReport` holds the operators that the graphs share, counts their sites, and refuses what does not fit. Mutates no
graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .capture.preconditions import refuse_train_mode
from .compile_options import Options
from .errors import CalibrationError, SiteError, StateError, StatisticsError
from .nn import MeanSparse
from .operators import OTHER_FUNCTION, alpha_by_site, answers_differ, set_backward, unknown_sites
from .passes.instrument import Moments
from .published import published_operator
from .rewrite import calls_of, operand
from .sites import SitePlan
from .sites.find import check_channel_dims
from .statistics import ChannelStatistics, Statistics, fingerprint

if TYPE_CHECKING:
    from .sites.dynamo import DynamoGraph


class _Entered(set[str]):
    """The sites that one call of a model came to. Its frame holds it as a trace function, which nobody calls unless
    somebody traces, and which is gone with the frame: it takes no weak reference.
    """

    def __call__(self, frame: FrameType, event: str, argument: Any) -> _Entered:
        return self


class CompileReport:
    """What the back end did to one model with one set of options; printing it gives the table.

    Attributes:
        options: What torch.compile was given.
        transformed: The model came with its operators; nothing was inserted.
        operators: By site name. Their buffers are inputs of the compiled code, everything else is compiled in.
        compilations: How many graphs were compiled, recompilations included.
        axes: Channel dimension of the tensors that are on their way from one graph to the next.
    """

    def __init__(self, model: nn.Module | None, options: Options) -> None:
        self.options = options
        self.operators: dict[str, MeanSparse] = {}
        self.transformed = any(isinstance(m, MeanSparse) for m in model.modules()) if model is not None else False
        self.compilations = 0
        self.axes = WeakTensorKeyDictionary()
        self._statistics: Statistics | None = None
        self._fingerprint = ""
        self._alpha: dict[str, float] = {}  # of the sites in the statistics, those of graphs yet to come too
        self._moments: dict[str, Moments] = {}
        self._plans: dict[tuple[CodeType, tuple[str, ...]], SitePlan] = {}
        self._starts: dict[tuple[CodeType, str], int] = {}
        self._calls: Counter[str] = Counter()
        self._checked = self._earlier = 0  # compilations when all were checked, when a call of the model last began
        if self.transformed:
            if options != Options(inner=options.inner, inner_options=options.inner_options, mode=options.mode):
                raise StateError(
                    "this model is transformed already: only the options inner, inner_options and mode apply. Set its "
                    "statistics, alpha and backward by meansparse_fx.set_statistics, set_alpha and set_backward"
                )
            return
        if model is not None:
            _refuse_published(model)
            refuse_train_mode(model, "the model", "before it is compiled")
        given = options.statistics
        self._statistics = Statistics.load(given) if isinstance(given, str | Path) else given
        if self._statistics is not None:
            self._alpha = alpha_by_site(options.alpha, self._statistics, allow_unknown=True)
        if model is not None:
            self._check_weights(model)

    def _check_weights(self, model: nn.Module) -> None:
        """Refuse statistics of another model; note which model is observed."""
        measured = self._statistics if self.options.check_weights else None
        if measured is not None or self.options.observe:
            self._fingerprint = fingerprint(model)
        if measured is None:
            return
        if self._fingerprint != measured.fingerprint:
            raise StatisticsError(
                "these statistics were measured on other weights (fingerprints differ): calibrate this model, or pass "
                "option check_weights=False if it is the same model in another precision"
            )
        if answers_differ(model, measured):
            raise StatisticsError(f"these statistics are of another model; {OTHER_FUNCTION}: calibrate this model")

    # What a user asks.

    @property
    def plan(self) -> SitePlan:
        """Every candidate site of all graphs."""
        sites = {site.name: site for plan in self._plans.values() for site in plan}
        return SitePlan(tuple(sites.values()), f"torch.compile, graphs: {len(self._plans)}")

    @property
    def graphs(self) -> tuple[SitePlan, ...]:
        """The plans of the single graphs, in the order they were compiled; recompilations are not counted again."""
        return tuple(self._plans.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the statistics have and no graph so far."""
        if self._statistics is None:
            return ()
        plan = self.plan
        kept = self._statistics.without(plan.left, self.options.placement.kinds)
        return tuple(sorted(kept.keys() - {site.name for site in plan.active}))

    def set_alpha(self, alpha: float | Mapping[str, float]) -> None:
        """Set the half width of the band as `meansparse_fx.set_alpha` does, for graphs yet to come too.

        Recompiles nothing.
        """
        if self.transformed:
            raise StateError("this model was transformed before it was compiled: give that model to msfx.set_alpha")
        if self.options.observe:
            raise StateError("option observe measures the base model, which has no alpha: compile without it")
        given = alpha_by_site(alpha, self.operators if self._statistics is None else self._statistics)
        for name in given.keys() & self.operators.keys():
            self.operators[name].set_alpha(given[name])
        self._alpha |= given

    def statistics(self, images: int = 0, metadata: dict[str, str] | None = None) -> Statistics:
        """Return what the observers saw so far.

        Args:
            images: How many images that was, for the record; graphs do not tell images from other tensors.
            metadata: Facts to keep with the statistics.

        Raises:
            CalibrationError: No observers, nothing seen, or NaN or inf.
        """
        if not self._moments:
            raise CalibrationError("nothing was observed: compile with options={'observe': True} and run the model")
        for name, m in self._moments.items():
            if not (m.count > 0 and m.mean.isfinite().all() and m.m2.isfinite().all()):
                raise CalibrationError(f"{name}: no values, NaN or inf in the site's input: check the data and weights")
        sites = {n: ChannelStatistics(int(m.count), m.mean.clone(), m.m2.clone()) for n, m in self._moments.items()}
        return Statistics(sites, self._fingerprint, images, {"torch": torch.__version__} | (metadata or {}))

    def __repr__(self) -> str:
        if self.transformed:
            return "transformed before it was compiled: nothing inserted"
        alphas = {f"{operator.get_alpha():g}" for operator in self.operators.values()}
        return f"{self.plan}\nalpha: {', '.join(sorted(alphas)) or 'none, the base model is observed'}"

    # What the back end tells it, graph by graph.

    def count(self, code: CodeType, first: bool, calls: Mapping[str, int]) -> dict[str, int]:
        """Return how often other graphs call each path, before this one; a recompilation gets the same answer."""
        starts = {}
        for path, number in calls.items():
            before = 0 if first else self._calls[path]
            starts[path] = self._starts.setdefault((code, path), before)
            self._calls[path] = max(self._calls[path], starts[path] + number)
        return starts

    def accept(self, plan: SitePlan) -> SitePlan:
        """Return the plan without the sites that the statistics lack, if that is allowed; check the others."""
        if self._statistics is None:
            return plan
        lacking = {site.name for site in plan.active if site.name not in self._statistics}
        if lacking and self.options.allow_missing:
            sites = (s.refused("missing", "not in the statistics") if s.name in lacking else s for s in plan)
            plan = SitePlan(tuple(sites), plan.route)
        channels = {site.name: site.channels for site in plan.active if site.channels is not None}
        known = {name: s for name, s in self._statistics.items() if name in channels}
        replace(self._statistics, sites=known).check(channels)
        return plan

    def share(self, graph_module: fx.GraphModule) -> None:
        """Take over the operators of a graph that are new; those of other graphs and compilations serve on."""
        set_backward(graph_module, self.options.backward)
        for node, operator in calls_of(graph_module, MeanSparse):
            value = operand(node).meta["example_value"]
            shared = self.operators.setdefault(operator.name, operator)
            shared.to(value.device, torch.float64 if value.dtype == torch.float64 else torch.float32)
            if shared is operator and self._statistics is not None:
                operator.set_statistics(self._statistics[operator.name])
                operator.set_alpha(self._alpha.get(operator.name, 0.0))

    def observe(self, plan: SitePlan, captured: DynamoGraph) -> dict[str, Moments]:
        """Return where each site's moments are accumulated."""
        nodes = {node.name: node for node in captured.graph.nodes}
        for site in plan.active:
            assert site.channels is not None
            device = nodes[site.node].meta["example_value"].device
            self._moments.setdefault(site.name, Moments(site.channels, device)).to(device)
        return self._moments

    def add(self, captured: DynamoGraph, plan: SitePlan) -> None:
        """Count a graph; with the model's last, check that all graphs together are what was asked for."""
        self.compilations += 1
        self._plans[captured.code, tuple(s.name for s in plan)] = plan.without_nodes()
        if captured.model is None and len(plan):
            raise SiteError(f"{plan.sites[0].name}: found outside of any module, so that its name says nothing")
        # Statistics of elsewhere have the sites that are disabled.
        left = captured.by_python or (captured.disabled if self.options.observe else "")
        if left and not self.options.allow_missing:
            raise SiteError(
                f"Dynamo leaves {left} to Python, for a graph break in a loop or in a part of it, or disabled; what "
                "activations that calls get no operator: take what transform(model, images) returns, or, where there "
                "are none, pass option allow_missing=True"
            )
        if captured.last and captured.model is not None:
            self._check()

    def following(
        self, compiled: Callable, axes: Sequence[int | None], plan: SitePlan, model_call: Callable[[], FrameType | None]
    ) -> Callable:
        """Return a graph's compiled form that notes the channel dimensions of what it puts out.

        Args:
            compiled: The graph.
            axes: The channel dimensions.
            plan: Its sites, each of which one call of the model may come to once.
            model_call: Returns the frame of the call of the model that is running.
        """
        names = {site.name for site in plan.active}

        def call(*args: Any) -> Any:
            self._enter(model_call(), names)
            outputs = compiled(*args)
            for value, axis in zip(outputs, axes, strict=True):
                if axis is not None and isinstance(value, Tensor):
                    self.axes[value] = axis
            return outputs

        return call

    def _enter(self, frame: FrameType | None, sites: set[str]) -> None:
        """Refuse sites that this call of the model has come to before; check what no last graph had checked."""
        if frame is None:
            return
        if frame.f_trace is None:
            frame.f_trace = _Entered()
            if self._earlier == self.compilations != self._checked:  # the last call compiled nothing: it was complete
                self._check()
            self._earlier = self.compilations
        entered = frame.f_trace
        if isinstance(entered, _Entered):  # and no debugger's
            if again := sorted(entered & sites):
                raise SiteError(
                    f"{again[0]}: Dynamo compiled one code for several calls in one forward, each of which is a "
                    "site of its own: take what transform(model, images) returns"
                )
            entered |= sites

    def _check(self) -> None:
        plan = self.plan
        skipped = {s.name: s.skipped for s in plan if s.skipped}
        if not plan.sites:
            raise SiteError(
                "no activation is in what Dynamo captured; if the model calls some, it does so in a loop with a graph "
                "break or under torch._dynamo.disable, which Python runs: take what transform(model, images) returns"
            )
        if not plan.active:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
            raise SiteError(f"none of the {len(plan)} candidate sites can be rewritten ({reasons})")
        names = {site.name for site in plan}
        if self.missing and not self.options.allow_missing:
            reasons = "; ".join(f"{name} ({skipped.get(name, 'no such call')})" for name in self.missing[:3])
            raise StatisticsError(
                f"statistics have {len(self.missing)} site(s) that none of the {len(self._plans)} graph(s) has: "
                f"{reasons}. Pass option allow_missing=True to go on without"
            )
        check_channel_dims(self.options.placement, names)
        if isinstance(alpha := self.options.alpha, Mapping) and (unknown := unknown_sites(alpha, names)):
            raise StateError(f"option alpha names {unknown[0]!r}, which is no site; sites are {', '.join(names)}")
        self._checked = self.compilations


def _refuse_published(model: nn.Module) -> None:
    if holding := [name for name, m in model.named_modules() if published_operator(m) is not None]:
        raise StateError(
            f"the model holds {len(holding)} published operators ({holding[0]}): compile "
            "meansparse_fx.transform(model, images) instead, which takes them over"
        )
