"""Floor 5: choose alpha on held-out data, against the worst of several attacks.

`run` is the verb; `halving` attacks the candidates, `result` is what came of it and the rule of choice.
"""

from ..names import ALPHAS, CLEAN_BUDGET, SEARCH_ATTACKS
from .result import AlphaSearch
from .run import select_alpha

__all__ = ["ALPHAS", "CLEAN_BUDGET", "SEARCH_ATTACKS", "AlphaSearch", "select_alpha"]
