"""Floor 3: what a calibration found, one row a site. Runs no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table
from torch import Tensor

from ..tables import new_table
from .moments import ChannelStatistics

if TYPE_CHECKING:
    from .artifact import Statistics

ALPHAS = (0.1, 0.2, 0.3)  # bands whose share of values is shown, where there are histograms


def _range(values: Tensor) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"


def _ratio(site: ChannelStatistics) -> str:
    alive = site.std > 0
    return f"{float((site.mean.abs() / site.std)[alive].max()):.3g}" if alive.any() else ""


COLUMNS: dict[str, Callable[[ChannelStatistics], str]] = {
    "channels": lambda site: str(len(site.mean)),
    "dead": lambda site: str(int((~(site.std > 0)).sum()) or ""),
    "values each": lambda site: f"{site.count:,}",
    "mean": lambda site: _range(site.mean),
    "std": lambda site: _range(site.std),
    "most |mean|/std": _ratio,
}


def summary_table(statistics: Statistics) -> Table:
    """Return the statistics as a rich table: ranges, dead channels, extreme ratios, shares inside the band."""
    columns = dict(COLUMNS)
    if any(site.histogram is not None for site in statistics.values()):
        columns[f"% in band at {', '.join(f'{alpha:g}' for alpha in ALPHAS)}"] = _shares
    facts = [f"{key}: {value}" for key, value in statistics.metadata.items()]
    title = "\n".join([f"{len(statistics)} sites, {statistics.images} images", *facts])
    caption = f"weights {statistics.fingerprint}" + (f", graph {statistics.graph}" if statistics.graph else "")
    table = new_table("site", *columns, optional=("values each", "most |mean|/std"), title=title, caption=caption)
    for name, site in statistics.items():
        table.add_row(name, *(cell(site) for cell in columns.values()))
    return table


def _shares(site: ChannelStatistics) -> str:
    """Return the shares of all the site's values in its bands, in percent."""
    if site.histogram is None:
        return ""
    shares = (float(site.histogram.share_inside(site.mean, alpha * site.std).mean()) for alpha in ALPHAS)
    return "  ".join(f"{100 * share:4.1f}" for share in shares)
