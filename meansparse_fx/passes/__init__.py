"""Floor 4: the only code that mutates a graph. One pass a file.

observe, sparsify, fuse and restore work on captured models; lower, instrument and write_back serve the torch.compile
plug-in.
"""

from .fuse import fuse
from .observe import observe
from .restore import restore
from .sparsify import sparsify

__all__ = ["fuse", "observe", "restore", "sparsify"]
