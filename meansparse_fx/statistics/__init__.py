"""Floor 3: what calibration measured: moments that merge exactly, their file, table and pictures.

`moments` is the arithmetic, `artifact` the mapping by site and its file, `summary` the table, `histogram` one channel's
values before and after an operator, `answers` what tells one base model from another.
"""

from .answers import Answers
from .artifact import FORMAT, Statistics, fingerprint, graph_fingerprint, weight_digests
from .histogram import FeatureHistogram, typical
from .moments import ChannelHistogram, ChannelStatistics, merged

__all__ = [
    "FORMAT",
    "Answers",
    "ChannelHistogram",
    "ChannelStatistics",
    "FeatureHistogram",
    "Statistics",
    "fingerprint",
    "graph_fingerprint",
    "merged",
    "typical",
    "weight_digests",
]
