"""MeanSparse as a torch.fx compiler pass: find the activations, measure, rewrite, tune, and attack honestly."""

from .activations import register_activation
from .alpha import AlphaSearch, select_alpha
from .backend import compile_report
from .calibrate import calibrate
from .cost import Cost, cost
from .errors import MeanSparseError
from .evaluate import Evaluation, evaluate, verify
from .operators import get_alpha, load_published, operators, set_alpha, set_backward, set_statistics, set_variant
from .sites import PLACEMENTS, Placement, Site, SitePlan
from .statistics import Statistics
from .transform import inspect, restore, transform

__all__ = [
    "PLACEMENTS",
    "AlphaSearch",
    "Cost",
    "Evaluation",
    "MeanSparseError",
    "Placement",
    "Site",
    "SitePlan",
    "Statistics",
    "calibrate",
    "compile_report",
    "cost",
    "evaluate",
    "get_alpha",
    "inspect",
    "load_published",
    "operators",
    "register_activation",
    "restore",
    "select_alpha",
    "set_alpha",
    "set_backward",
    "set_statistics",
    "set_variant",
    "transform",
    "verify",
]
