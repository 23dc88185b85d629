"""Floor 2: from a captured graph to the plan of its sites.

- `find`: all steps in order. `plan`: the words for what is found; `placements`: the published choices among sites.
- `shapes`: what each node yields. `ops`: what each node is, by the rows of `op_table` or as torch says.
- `axis`: the channel dimension of each tensor.
- `candidates`: calls of activations; `composites`: those written out in other calls, which `pointwise` runs on numbers;
  `residual`: sums.
- `gates`: what is left alone. `aliases`: in-place activations whose input others see.
- `dynamo`: the same for graphs of torch.compile; `inlined`: activation modules that Dynamo traced into.
"""

from .find import find_sites
from .placements import PLACEMENTS, placement_of
from .plan import Placement, Site, SitePlan

__all__ = ["PLACEMENTS", "Placement", "Site", "SitePlan", "find_sites", "placement_of"]
