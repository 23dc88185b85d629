"""Floor 2: whether a graph is the model: the same values, bit for bit, and gradients; and every activation in sight.

Shown by operations where both can be recorded and are the same: then it holds for any images of the example's size, in
batches of two and three. Otherwise by numbers: on two batches both are run, on a copy, and differentiated with respect
to images and parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..batches import cycled
from ..copies import copied_leaves, shadow
from ..dataless import Forms
from ..errors import CaptureError
from ..hooks import hint_of_hooks
from ..outputs import difference, flatten
from ..sites.plan import Refusal
from ..state import kept_buffers, kept_parameters, state_of
from .counting import ActivationCounter, WrittenOut, count_activations, hides_an_activation
from .derivatives import applied_functions, without_checkpoints
from .guards import BATCH_SIZES
from .lines import TORCH, in_words, source_line
from .modes import plain_attention
from .randomness import check_drawn_anew, check_unused, generator_state, undone_draws
from .recording import Halted, Recording, record

_call: Callable = nn.Module.__call__  # a GraphModule's own prints a traceback where it fails
_OWN_BACKWARD = "an activation inside of {}, a torch.autograd.Function, which has its own gradient"


@dataclass(slots=True)
class Reference:
    """What a model computes on two batches of different size, and how many activations it calls.

    Recorded where it can be (see `recording`), which costs no arithmetic; the numbers themselves are computed when
    something has to be decided by them.
    """

    model: nn.Module
    batches: tuple[Tensor, ...]
    recordings: tuple[Recording, ...] = ()
    activations: int = 0
    _own_backwards: frozenset[type] = frozenset()  # Functions that call activations, each then one itself
    _outputs: tuple[Any, ...] | None = None
    _changed: str = ""
    _draws: bool = False  # random numbers of torch
    _forms: Forms = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Reference:
        """Return the reference on two batches, cycling through the rows if there are too few."""
        if len(images) == 0:
            raise CaptureError("the example images are an empty batch: pass at least one image")
        reference = cls(model, tuple(cycled(images, size) for size in BATCH_SIZES))
        with undone_draws() as drawn:
            try:
                reference._record()
            except Exception:  # values are asked for, an operator needs data, or the model fails: computing tells
                reference._compute()
            if drawn():
                check_unused(lambda: _run(shadow(model), reference.batches[0]))
        return reference

    def check(self, graph_module: fx.GraphModule) -> str:
        """Return by what the graph was seen to compute the same: ``operations``, or only ``numbers``.

        Raises:
            CaptureError: It computes something else, has other gradients, or hides an activation.
        """
        applied = applied_functions(graph_module)
        own_backwards = {node: function for node, function in applied.items() if function in self._own_backwards}
        shown = count_activations(graph_module) + len(own_backwards)
        if shown < self.activations:
            raise CaptureError(
                f"the model calls {self.activations} activations and the graph shows {shown}: "
                f"{self.activations - shown} are hidden in modules, functions or hooks that are not traced into"
            )
        for node, function in applied.items():
            if node in own_backwards or (self.recordings and hides_an_activation(function, node.args[2:])):
                reason = _OWN_BACKWARD.format(function.__qualname__)
                node.meta["refusal"] = Refusal(reason, node.name, kind="own backward")
        same = bool(self.recordings) and self._records_the_same(graph_module)
        if not same:
            self._check_numbers(graph_module)
        if self._draws:
            with copied_leaves(graph_module), kept_buffers(graph_module):
                own, graph = (partial(_run, m, self.batches[0]) for m in (shadow(self.model), graph_module))
                check_drawn_anew(own, graph)
        with copied_leaves(graph_module), WrittenOut(graph_module) as mode:
            if mode.leaves:
                with kept_buffers(graph_module):
                    _run(graph_module, self.batches[0])
        if mode.found:
            raise CaptureError(f"not traced into, and written out in there: {', '.join(mode.found)}")
        return "operations" if same else "numbers"

    def _record(self) -> None:
        own, state = shadow(self.model), state_of(self.model)
        mirrored = state_of(own, state)
        counter, recordings = ActivationCounter(own), []
        for batch in self.batches:
            with _conditions(batch) as drawn, kept_parameters(own), counter:
                recordings.append(record(own, batch, mirrored, self._forms))
                self._draws |= drawn()
        if any(now is not mirrored[name] for name, now in state_of(own, state).items()):
            raise CaptureError("it gives a buffer new values, which is no operator call")
        self.recordings = tuple(recordings)
        self.activations, self._own_backwards = counter.found()

    def _records_the_same(self, graph_module: fx.GraphModule) -> bool:
        try:
            both = zip(self.batches, self.recordings, strict=True)
            return all(self._recorded(graph_module, batch) == recording for batch, recording in both)
        except Exception:  # the numbers will tell whether that is the graph's fault
            return False

    def _recorded(self, graph_module: fx.GraphModule, batch: Tensor) -> Recording:
        with copied_leaves(graph_module), _conditions(batch):
            state = state_of(graph_module, state_of(self.model))
            return record(partial(_call, graph_module), batch, state, self._forms)

    def _compute(self) -> tuple[Any, ...]:
        """Return the model's outputs, computed once."""
        if self._outputs is not None:
            return self._outputs
        own = shadow(self.model)
        counter, outputs = ActivationCounter(own), []
        for batch in self.batches:
            try:
                with kept_parameters(own) as reassigned, counter, _conditions(batch, wanted=False) as drawn:
                    outputs.append((own(batch.clone()), {name: b.clone() for name, b in own.named_buffers()}))
                    self._draws |= drawn()
            except Exception as error:
                raise CaptureError(
                    f"{type(own).__name__} itself fails on images of shape {list(batch.shape)}, dtype {batch.dtype}, "
                    f"device {batch.device}: {type(error).__name__}: {error}. Pass example images as the model takes "
                    f"them (on the command line --input-shape 1,28,28, or --data of such images, of which files are "
                    f"read as RGB and arrays as they are){hint_of_hooks(own)}"
                ) from error
        self._outputs = tuple(outputs)
        self.activations, self._own_backwards = counter.found()
        if reassigned:
            self._changed = f". It gives {reassigned[0]} new values whenever it runs, which no graph does"
        return self._outputs

    def _check_numbers(self, graph_module: fx.GraphModule) -> None:
        with kept_buffers(graph_module):
            for batch, (expected, state) in zip(self.batches, self._compute(), strict=True):
                try:
                    actual = _run(graph_module, batch)
                except Exception as error:
                    raise CaptureError(
                        f"the captured graph fails on a batch of {len(batch)}: {type(error).__name__}: {error}"
                    ) from error
                if differs := difference(actual, expected):
                    raise CaptureError(
                        f"the captured graph {differs} on a batch of {len(batch)}{self._where(graph_module)}. A "
                        "branch on the type of a tensor does that, or a tensor that is changed in place under two "
                        f"names{self._changed or self._unsteady()}"
                    )
                for name, buffer in graph_module.named_buffers():
                    if name in state and difference(buffer, state[name]):
                        raise CaptureError(f"forward gives {name} a value that no graph does: write {name}.copy_(...)")
        for batch in self.batches:
            with kept_buffers(graph_module):
                lost = self._other_gradients(graph_module, batch)
            if lost:
                raise CaptureError(
                    f"the captured graph has the model's values on a batch of {len(batch)}, but not its gradients with "
                    f"respect to {', '.join(lost[:3])}{self._where(graph_module)}. A torch.autograd.Function keeps a "
                    "backward of its own, x.detach() and torch.no_grad() keep a gradient out"
                )

    def _other_gradients(self, graph_module: fx.GraphModule, batch: Tensor) -> list[str]:
        """Return the names of those with respect to which a graph has other gradients than the model."""
        own = shadow(self.model)
        with kept_parameters(own):
            expected = _gradients(own, batch)
        if expected is None:
            return []
        actual = _gradients(graph_module, batch)
        return [n for n, value in expected.items() if actual is None or not _same_gradient(actual.get(n), value)]

    def _unsteady(self) -> str:
        """Return why no graph can do what the model does, if it depends on more than the images."""
        if self._draws:
            return ". It makes numbers, branches or constants of torch's random numbers, and a graph repeats the first"
        own = shadow(self.model)
        if difference(_run(own, self.batches[0]), _run(own, self.batches[0])):
            return ". Run again on the same images it returns something else: keep state in buffers, use rand_like"
        return ""

    def _where(self, graph_module: fx.GraphModule) -> str:
        """Return where model and graph part, as far as recordings tell."""
        batch, own, state = self.batches[0], shadow(self.model), state_of(self.model)
        try:
            calls = self._recorded(graph_module, batch).calls
            index = next(i for i, (a, b) in enumerate(zip(calls, self.recordings[0].calls, strict=False)) if a != b)
            with _conditions(batch), kept_parameters(own):
                record(own, batch, state_of(own, state), self._forms, halt=index)
        except Halted as halted:
            line = source_line(halted)
            if not line.filename.startswith(TORCH):  # else it is no line of the model's
                return f": they part at {in_words(line)}"
        except Exception:
            pass
        return ""


@contextmanager
def _conditions(images: Tensor, wanted: bool = True, seed: int = 0) -> Iterator[Callable[[], bool]]:
    """Run with gradients or without, with the same random numbers each time; yield what tells whether any was drawn."""
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), torch.set_grad_enabled(wanted), plain_attention():
        torch.manual_seed(seed)
        generators = [torch.device("cpu"), *devices]
        before = [*map(generator_state, generators)]
        yield lambda: [*map(generator_state, generators)] != before


def _run(model: nn.Module, images: Tensor, seed: int = 0) -> Any:
    with _conditions(images, wanted=False, seed=seed):
        return _call(model, images.clone())


def _gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor | None] | None:
    """Return the gradients of a random combination of all outputs, by parameter; None if they cannot be computed."""
    wanted = {"the images": images.clone()} | dict(model.named_parameters())
    wanted["the images"].requires_grad_(images.is_floating_point())
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    try:
        with _conditions(images), without_checkpoints():
            outputs = flatten(_call(model, wanted.get("the images", images).clone()))[0]
            outputs = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
            torch.manual_seed(1)
            given = [torch.randn_like(t) for t in outputs]
            found = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True) if outputs else ()
    except Exception:  # the model is not made for gradients
        return None
    return dict(zip(wanted, found, strict=False))


def _same_gradient(actual: Tensor | None, expected: Tensor | None) -> bool:
    """Return whether two gradients agree to rounding: TorchScript, compilers, some devices add up in another order."""
    if actual is None or expected is None or not expected.numel():
        return (actual is None) == (expected is None)
    rounding = 64 * torch.finfo(expected.dtype).eps * expected.detach().abs().nan_to_num().amax()
    return bool(((actual - expected).abs() <= rounding).logical_or(actual.isnan() & expected.isnan()).all())
