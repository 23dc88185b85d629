"""Floor 4: the only code that mutates a graph. One pass a file.

sparsify, fuse, observe and restore work on captured models; refuse_hooks and held_parts guard what a graph does not
call, and Added keeps how it was made. returning_logits, readout and reveal serve attacks; inline_checkpoints, lower,
instrument and write_back the torch.compile plug-in.
"""

from .added import Added
from .fuse import fuse
from .logits import returning_logits
from .observe import observe
from .restore import restore
from .sparsify import sparsify
from .uncalled import held_parts, refuse_hooks

__all__ = ["Added", "fuse", "held_parts", "observe", "refuse_hooks", "restore", "returning_logits", "sparsify"]
