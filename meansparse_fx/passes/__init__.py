"""Floor 4: the only code that mutates a graph. One pass a file: observe, sparsify, restore."""

from .observe import observe
from .restore import restore
from .sparsify import sparsify

__all__ = ["observe", "restore", "sparsify"]
