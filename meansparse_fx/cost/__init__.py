"""Floor 5: what a model's operators must move: bytes and calls at each site, counted and not timed.

`run` is the verb; `forms` holds what stands at a site, in every form that is compared; `tally` counts.
"""

from .run import Cost, cost

__all__ = ["Cost", "cost"]
