"""Floor 4: the graph of a model whose result holds its logits, as one whose result they are.

Requires: any GraphModule. Ensures: a new one that shares all parameters, buffers and operators, so that alpha and the
backward mode are those of the original.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from .. import rewrite
from ..errors import EvaluationError
from ..outputs import Logits, logits_in

NAME = "meansparse_logits"


class TakeLogits(nn.Module):
    """Takes the logits out of what a model returns; see `logits_in`."""

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, output: Any) -> Tensor:
        """Return them."""
        return logits_in(output, self.logits)


def returning_logits(model: fx.GraphModule, logits: Logits = None) -> fx.GraphModule:
    """Return a graph whose result are the logits; the model itself if it returns one tensor, and nothing is asked for.

    Args:
        logits: Where they are; see `logits_in`.

    Raises:
        EvaluationError: The model has forward hooks, which would see them in the place of what it returns.
    """
    (output,) = model.graph.find_nodes(op="output")
    result = output.args[0]
    if logits is None and isinstance(result, fx.Node) and not isinstance(result.target, type):
        return model
    if model._forward_hooks:
        raise EvaluationError(
            "the model has forward hooks, which see all that it returns: remove them, or let it return its logits alone"
        )

    def take(clone: fx.GraphModule) -> None:
        (output,) = clone.graph.find_nodes(op="output")
        clone.add_submodule(NAME, TakeLogits(logits))
        with clone.graph.inserting_before(output):
            output.args = (clone.graph.call_module(NAME, (output.args[0],)),)

    return rewrite.edited_copy(model, "returning_logits", take)
