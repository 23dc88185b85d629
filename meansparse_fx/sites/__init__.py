"""Floor 2: from a captured graph to the plan of its sites."""

from .find import find_sites
from .placements import PLACEMENTS, placement_of
from .plan import Placement, Site, SitePlan

__all__ = ["PLACEMENTS", "Placement", "Site", "SitePlan", "find_sites", "placement_of"]
