"""Floor 6: the torch.compile plug-in, ``torch.compile(model, backend="meansparse", options={...})``.

Found by torch through the entry point group ``torch_dynamo_backends``. Dynamo calls it once a graph: once for most
models, once for each part where the graph breaks, again where it recompiles. What the graphs of one model share
is in its `CompileReport`; the passes do the rewriting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from .compilation import CompileReport
from .compile_options import Options, inner_compiler
from .errors import StateError
from .kernels import ops
from .passes.inline_checkpoints import inline_checkpoints
from .passes.instrument import instrument
from .passes.lower import lower
from .passes.sparsify import sparsify
from .passes.write_back import write_back

# What an operator becomes: where the graph is run as it is, the fastest kernel; for compilers, aten operators.
_CALLS: dict[Any, Callable[..., Tensor]] = {"eager": ops.mean_sparse}

_REPORTS: WeakKeyDictionary[nn.Module, list[CompileReport]] = WeakKeyDictionary()


def meansparse(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Return one graph of Dynamo's, rewritten and compiled by the inner back end.

    Not called directly: ``torch.compile(model, backend="meansparse", options=...)``. A plain model gets operators at
    the sites that `transform` would find, under the same names. A transformed model has them already: its graphs
    go to the inner back end as they are, operators included as aten operators.

    Args:
        options: See `Options`.
        mode: Of torch.compile, passed on to Inductor; an option as well.

    Raises:
        StateError: An option or an inner back end that does not exist, a model in train mode, alpha without
            statistics, statistics or alpha for a transformed model.
        SiteError: No site in the whole model, or one that cannot be rewritten safely.
        StatisticsError: The statistics do not fit.
    """
    # Dynamo is running, so importing this costs nothing; at the top it would.
    from .sites.dynamo import DynamoGraph, model_call

    asked = Options.read(options, mode)
    compile_inner = inner_compiler(asked)
    captured = DynamoGraph.of(graph_module, example_inputs)
    report = _report_of(captured.model, asked)
    if report.transformed:
        return compile_inner(graph_module, example_inputs)
    if inline_checkpoints(graph_module):
        captured = DynamoGraph.of(graph_module, example_inputs)
    with torch.inference_mode(False), torch.no_grad():  # buffers made in inference mode could never meet autograd
        calls_before = partial(report.count, captured.code, captured.first)
        found = captured.find(asked.placement, calls_before, report.axes.get)
        plan = report.accept(found.plan)
        if asked.observe:
            instrument(graph_module, plan, report.observe(plan, captured))
        elif plan.active:
            sparsify(graph_module, plan)
            report.share(graph_module)
            write_back(graph_module, [s for s in plan.active if s.name in found.overwriting])
            lower(graph_module, report.operators, _CALLS.get(asked.inner, ops.composed))
        graph_module.recompile()
        report.add(captured, plan)
    compiled = compile_inner(graph_module, example_inputs)
    return compiled if captured.last else report.following(compiled, found.output_axes, plan, model_call)


meansparse.reset = _REPORTS.clear  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def compile_report(compiled: nn.Module, options: Mapping[str, Any] | None = None) -> CompileReport:
    """Return what the meansparse back end did to a compiled model, and the handle to its operators.

    Args:
        compiled: What torch.compile returned, or the model itself; it must have run once.
        options: Those it was compiled with, needed only if the model was compiled with several.

    Raises:
        StateError: The model did not pass through this back end, or several times.

    Example:
        >>> import torch, meansparse_fx as msfx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.GELU()).eval()
        >>> images = torch.rand(8, 1, 8, 8)
        >>> stats = msfx.calibrate(msfx.transform(net, images), [images], progress=False)
        >>> options = {"statistics": stats, "alpha": 0.2, "inner": "eager"}
        >>> compiled = torch.compile(net, backend="meansparse", options=options)
        >>> y = compiled(images)
        >>> msfx.compile_report(compiled).set_alpha(0.0)
        >>> bool((compiled(images) == net(images)).all()), bool((y == net(images)).all())
        (True, False)
    """
    reports = _REPORTS.get(getattr(compiled, "_orig_mod", compiled), [])
    if options is not None:
        asked = Options.read(options)
        reports = [report for report in reports if report.options == asked]
    if not reports:
        raise StateError(
            'nothing compiled by backend="meansparse" for this model and these options: call the compiled model '
            "once. If it was, Dynamo leaves all of it to Python (an nn.GRU, checkpoint_sequential, a graph break in a "
            "loop), and it has no operators: take what transform(model, images) returns"
        )
    if len(reports) > 1:
        raise StateError("the model was compiled with several options: pass those that are meant as options=")
    return reports[0]


def _report_of(model: nn.Module | None, asked: Options) -> CompileReport:
    """Return the report for a model and options; torch.compile shares code between equal options as well."""
    if model is None:
        return CompileReport(None, asked)
    reports = _REPORTS.setdefault(model, [])
    for report in reports:
        if report.options == asked:
            return report
    reports.append(CompileReport(model, asked))
    return reports[-1]
