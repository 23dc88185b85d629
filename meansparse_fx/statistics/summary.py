"""Floor 3: what a calibration found, one row a site. Runs no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from ..tables import new_table
from .moments import ChannelStatistics

if TYPE_CHECKING:
    from .artifact import Statistics

ALPHAS = (0.1, 0.2, 0.3)  # bands whose share of values is shown, where there are histograms


def summary_table(statistics: Statistics) -> Table:
    """Return the statistics as a rich table: ranges, dead channels, extreme ratios, shares inside the band."""
    facts = [f"{key}: {value}" for key, value in statistics.metadata.items()]
    counted = any(s.histogram is not None for s in statistics.values())
    columns = ["channels", "dead", "values each", "mean", "std", "most |mean|/std"]
    if counted:
        columns.append(f"% in band at {', '.join(f'{alpha:g}' for alpha in ALPHAS)}")
    title = "\n".join([f"{len(statistics)} sites, {statistics.images} images", *facts])
    caption = f"weights {statistics.fingerprint}" + (f", graph {statistics.graph}" if statistics.graph else "")
    table = new_table("site", *columns, optional=("values each", "most |mean|/std"), title=title, caption=caption)
    for name, site in statistics.items():
        table.add_row(name, *_row(site), *([_shares(site)] if counted else []))
    return table


def _row(site: ChannelStatistics) -> list[str]:
    alive = site.std > 0
    ranges = (f"{float(v.min()):.3g} to {float(v.max()):.3g}" for v in (site.mean, site.std))
    ratio = f"{float((site.mean.abs() / site.std)[alive].max()):.3g}" if alive.any() else ""
    return [str(len(site.mean)), str(int((~alive).sum()) or ""), f"{site.count:,}", *ranges, ratio]


def _shares(site: ChannelStatistics) -> str:
    """Return the shares of all the site's values in its bands, in percent."""
    if site.histogram is None:
        return ""
    shares = (float(site.histogram.share_inside(site.mean, alpha * site.std).mean()) for alpha in ALPHAS)
    return "  ".join(f"{100 * share:4.1f}" for share in shares)
