"""Floor 2: from a captured graph to the plan of its sites."""

from .plan import Placement, Site, SitePlan

__all__ = ["Placement", "Site", "SitePlan"]
