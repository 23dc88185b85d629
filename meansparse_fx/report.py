"""Floor 5: what was found, as pictures, one HTML page and one JSON file; for it, what an operator does to one channel.

Draws and writes; runs a model only to look at its features. Imports matplotlib, which the package itself never does.
"""

from __future__ import annotations

import base64
import json
import math
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, fx

from .alpha import AlphaSearch
from .alpha.figures import alpha_figure, tradeoff_figure
from .artifacts import write_folder
from .evaluate import Evaluation
from .evaluate.figures import evaluation_figure
from .evaluate.outcome import mean
from .kernels.reference import inside_band, per_channel, sparsify
from .nn import MeanSparse
from .operators import added, operators
from .plots import DARK, LIGHT, Theme, histogram_figure, percent, picture
from .rewrite import sharing_copy
from .sites import SitePlan
from .statistics import FeatureHistogram, typical
from .tables import as_html


def headline(evaluation: Evaluation, search: AlphaSearch | None = None) -> str:
    """Return the result in plain sentences: verdict, worst case, clean accuracy, and what the search had asked for."""
    change, outcomes = evaluation.clean_change, (evaluation.base, evaluation.sparse)
    shares = {"clean accuracy": [mean(outcome.clean) for outcome in outcomes]}
    if evaluation.sparse.robust:
        shares = {"the worst case": [mean(outcome.worst) for outcome in outcomes]} | shares
    moves = ", and ".join(f"{what} from {percent(b)} to {percent(s)}" for what, (b, s) in shares.items())
    text = (
        f"{evaluation.verdict} On {evaluation.n_test} test images, {describe_alpha(evaluation.alpha)} takes {moves}: "
        f"{change.points()} points (95 % intervals)."
    )
    if search and not chosen(evaluation, search):
        text += f" The search itself chose {describe_alpha(search.alpha)}: it found nothing better beyond noise."
    if search and -change.estimate > search.clean_budget + 1e-12:
        text += (
            f" The clean loss of {-100 * change.estimate:.1f} points is more than the {100 * search.clean_budget:g} "
            "that were to be spent."
        )
    return text


def chosen(evaluation: Evaluation, search: AlphaSearch) -> bool:
    """Return whether what was evaluated is what the search chose."""
    pair = (evaluation.alpha, search.alpha)
    sites = next((alpha.keys() for alpha in pair if isinstance(alpha, Mapping)), ("all",))
    by_site = [alpha if isinstance(alpha, Mapping) else dict.fromkeys(sites, alpha) for alpha in pair]
    return all(math.isclose(by_site[0][s], by_site[1][s], rel_tol=1e-6) for s in sites)  # a model's alpha is float32


def describe_alpha(alpha: float | Mapping[str, float]) -> str:
    """Return alpha in words."""
    return f"alpha {alpha:g}" if isinstance(alpha, float) else "the alphas set site by site"


def write_report(
    out: Path,
    sparse: fx.GraphModule,
    evaluation: Evaluation,
    images: Tensor,
    *,
    model: str,
    data: Mapping[str, str],
    search: AlphaSearch | None = None,
) -> dict[str, Any]:
    """Return the contents of ``report.json``, having written it, ``report.html`` and `result_files` into ``out``.

    Args:
        sparse: The model, calibrated, at the alpha of the evaluation.
        images: ``[N, C, H, W]``, of which features are looked at.
        model, data: What was measured, and what each set of images was, by its role, in words.
        search: That chose alpha, if there was one: drawn, too, and the headline holds the result to its clean budget.
    """
    plan, statistics = added(sparse).plan, added(sparse).statistics
    assert statistics is not None  # or there is nothing to evaluate
    histogram = feature_histogram(sparse, images)
    report = evaluation.to_dict() | {
        "headline": headline(evaluation, search),
        "model": model,
        "data": dict(data),
        "calibration": {"images": statistics.images, "fingerprint": statistics.fingerprint},
        "route": plan.route,
        "sites": _site_rows(plan, band_shares(sparse, images)),
        "search": search.to_dict() if search else None,
        "versions": versions(),
        "date": date.today().isoformat(),
    }
    contents = result_files(search, evaluation, histogram)
    plots: dict[str, dict[str, str]] = {}
    for name, draw in _drawings(search, evaluation, histogram).items():
        light, dark = (picture(draw(theme)) for theme in (LIGHT, DARK))
        contents[f"{name}.png"] = light
        plots[name] = {k: base64.b64encode(v).decode() for k, v in (("light", light), ("dark", dark))}
    page = render(
        "report.html.j2",
        report=report,
        evaluation=evaluation,
        search=search,
        chosen=search and chosen(evaluation, search),
        describe=describe_alpha,
        histogram=histogram,
        plots=plots,
    )
    contents["report.html"] = page.encode()
    contents["report.json"] = (json.dumps(report, indent=2) + "\n").encode()
    write_folder(out, contents)
    return report


def render(template: str, **given: Any) -> str:
    """Return a template of this package, HTML or Markdown, which knows what is ``given``."""
    environment = jinja2.Environment(
        autoescape=template.endswith(".html.j2"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    filters = {"percent": lambda v: f"{100 * v:.1f}", "points": lambda v: f"{100 * v:+.1f}", "html": as_html}
    environment.filters |= filters
    return environment.from_string((files(__package__) / template).read_text("utf-8")).render(given)


def result_files(
    search: AlphaSearch | None = None,
    evaluation: Evaluation | None = None,
    histogram: FeatureHistogram | None = None,
    form: str = "pdf",
) -> dict[str, bytes]:
    """Return files by name: figures of the results, in the format ``form``, and their tables as LaTeX and CSV."""
    files = {f"{n}.{form}": picture(draw(LIGHT), form) for n, draw in _drawings(search, evaluation, histogram).items()}
    for name, result in (("search", search), ("evaluation", evaluation)):
        if result is not None:
            files |= {f"{name}.tex": result.to_latex().encode(), f"{name}.csv": result.to_csv().encode()}
    return files


def _drawings(
    search: AlphaSearch | None, evaluation: Evaluation | None, histogram: FeatureHistogram | None
) -> dict[str, Callable[[Theme], Figure]]:
    found: dict[str, Callable[[Theme], Figure]] = {}
    if search is not None:
        found |= {"alpha": partial(alpha_figure, search), "tradeoff": partial(tradeoff_figure, search)}
    if evaluation is not None:
        found["evaluation"] = partial(evaluation_figure, evaluation)
    if histogram is not None:
        found["histogram"] = partial(histogram_figure, histogram)
    return found


def versions() -> dict[str, str]:
    """Return the versions of what decides a result."""
    packages = ("meansparse_fx", "pyautoattack", "numpy")
    known = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return known | {name: version(name) for name in packages}


def _site_rows(plan: SitePlan, shares: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {name: getattr(s, name) for name in ("name", "channels", "channel_dim", "producer", "skipped")}
        | {"activation": s.activation.name if s.activation else s.kind, "shape": list(s.shape[1:])}
        | {"in_band": float(shares[s.name].mean()) if s.name in shares else None}
        for s in plan
    ]


@torch.no_grad()
def band_shares(sparse: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Return, by site, the share ``[C]`` of each channel's values that lie in the band at the model's alpha."""
    shares: dict[str, Tensor] = {}

    def look(operator: MeanSparse, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        band = operator.centre, operator.threshold
        centre, threshold = (per_channel(v, x.dim(), operator.channel_dim) for v in band)
        inside = inside_band(x, centre, threshold).movedim(operator.channel_dim, 0).flatten(1)
        shares[operator.name] = inside.double().mean(1).cpu()

    _run_watched(sparse, images, look)
    return shares


@torch.no_grad()
def feature_histogram(
    sparse: fx.GraphModule, images: Tensor, place: tuple[str, int] | None = None, bins: int = 120
) -> FeatureHistogram:
    """Return the histogram of one channel's features on images ``[N, ...]``, before and after its operator.

    Args:
        sparse: A transformed model, at the alpha of interest.
        place: Site and channel, by default the `typical` ones.
        bins: About how many, over the middle 99.8 % of the values and the whole band, whose edges are edges of bins.
    """
    shares = band_shares(sparse, images)
    site, channel = place or typical(shares)
    kept: list[Tensor] = []
    operator = operators(sparse)[site]

    def look(seen: MeanSparse, inputs: tuple[Tensor, ...]) -> None:
        if seen is operator:
            kept.append(inputs[0].detach().movedim(operator.channel_dim, 0)[channel].flatten())

    _run_watched(sparse, images, look)
    before = torch.cat(kept)
    centre, threshold = (operator.get_buffer(name)[channel] for name in ("centre", "threshold"))
    after = sparsify(before, centre, threshold, operator.variant, "exact", operator.steepness)
    mean, band = float(centre), float(threshold)
    values, sparse_values = (v.double().cpu().numpy() for v in (before, after))
    low, high = np.quantile(values, [0.001, 0.999])
    low, high = min(low, mean - 1.5 * max(band, 0.0)), max(high, mean + 1.5 * max(band, 0.0))
    width = (high - low) / bins or 1.0
    # The mean sits in the middle of a bin, so that the bar it becomes stands on it; the band is an odd number of bins.
    if band > width / 6:
        width = 2 * band / (2 * round(band / width - 0.5) + 1)
    first, last = np.floor((low - mean) / width), np.ceil((high - mean) / width)
    edges = mean + width * (np.arange(first, last + 2) - 0.5)
    counts = [np.histogram(v, edges)[0] / len(values) for v in (values, sparse_values)]
    return FeatureHistogram(
        site, channel, edges, counts[0], counts[1], mean, band, float(operator.get_buffer("alpha")),
        float(shares[site][channel]), len(images),
    )  # fmt: skip


def _run_watched(sparse: fx.GraphModule, images: Tensor, look: Any) -> None:
    """Run the model on ``images``, showing each operator's input to ``look``; a fused one takes another, so unfused."""
    with ExitStack() as stack:
        for operator in operators(sparse).values():
            stack.callback(operator.register_forward_pre_hook(look).remove)
        sharing_copy(sparse)(images)
