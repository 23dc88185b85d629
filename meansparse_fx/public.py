"""The front door: what is public, under the names that `meansparse_fx` has for it. Imports every floor but the top."""

# ruff: noqa: F401

import sys

from .activations import register_activation
from .alpha import AlphaSearch, select_alpha
from .backend import compile_report
from .calibrate import calibrate
from .cost import Cost, cost
from .errors import MeanSparseError
from .evaluate import Evaluation, evaluate, verify
from .operators import get_alpha, operators, set_alpha, set_backward, set_statistics, set_variant
from .sites import PLACEMENTS, Placement, Site, SitePlan
from .statistics import Statistics
from .transform import inspect, load, load_published, restore, save, transform

_package = sys.modules[__package__ or ""]
vars(_package).update({name: value for name, value in globals().items() if name in _package.__all__})
