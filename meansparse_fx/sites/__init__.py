"""Floor 2: from a captured graph to the plan of its sites."""

from .find import find_sites
from .plan import Placement, Site, SitePlan

__all__ = ["Placement", "Site", "SitePlan", "find_sites"]
