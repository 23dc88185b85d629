"""Floor 2: from a model to a `torch.fx` graph that computes the same thing, with every activation in sight.

In the order in which a model passes through:

- `preconditions`: what is refused at once: train mode, TorchScript, quantised models.
- `routes`: the ways to a graph, one row each, and the graph put together on a copy of the model.
- `tracing`: the plain symbolic trace, through all modules that are no `leaves`. What torch.fx would lose is kept
  in `derivatives` (own backwards, tensor hooks), `modes` (no_grad, autocast) and `functions` (compiled ones). `codegen`
  writes the graph's forward, which restores modes where it fails and refuses what changed beside the graph.
- `examples`: the trace that asks example images where Python asks for shapes. `proxies` answer, `guards` refuse batches
  that were not answered for.
- `verify`: is the graph the model? By operator calls (`recording`), or else by numbers; `counting` looks for hidden
  activations, `randomness` for random numbers that a graph would repeat.
- `lines`: the line of the model's code that a message names.
"""

from .routes import ROUTES, Capture, capture

__all__ = ["ROUTES", "Capture", "capture"]
