"""Floor 5: measure each site's statistics with the instrumented graph, in one pass over the data.

`run` is the verb; `source` reads a loader, `totals` holds the moments of all sites, `convergence` says when they are
good enough, `checkpoint` keeps a pass on disk.
"""

from .run import calibrate

__all__ = ["calibrate"]
