"""Floor 4: the only code that mutates a graph. One pass a file.

observe, sparsify, fuse, restore and returning_logits work on captured models, refuse_hooks and held_parts on what they
leave of them; inline_checkpoints, lower, instrument and write_back serve the torch.compile plug-in.
"""

from .fuse import fuse
from .logits import returning_logits
from .observe import observe
from .restore import restore
from .sparsify import sparsify
from .uncalled import Added, held_parts, refuse_hooks

__all__ = ["Added", "fuse", "held_parts", "observe", "refuse_hooks", "restore", "returning_logits", "sparsify"]
