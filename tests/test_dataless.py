"""Running without data: what torch's operators give, of every form, as with real tensors."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from meansparse_fx.dataless import Dataless, DatalessMode, NeedsData, storage


def hooked(module):
    module.register_forward_hook(lambda _, args, y: y[:1])
    return module


def replaced(module):
    module.forward = lambda x: x[:1]
    return module


def filled(x):
    whole = torch.zeros(2, 8, 6, 6)
    whole[:, ::2] = x
    return whole


X, IDS = torch.rand(2, 4, 6, 6), torch.arange(1, 9).view(2, 4)
# Calls whose results are of one form or another.
CALLS = {
    "activation": (nn.SiLU(), (X,)),
    "norm": (nn.BatchNorm2d(4).eval(), (X,)),
    "norm of another type": (nn.BatchNorm2d(4).double().eval(), (X.double(),)),
    "norm, channels last": (nn.BatchNorm2d(4).eval(), (X.to(memory_format=torch.channels_last),)),
    "function": (F.layer_norm, (X, (6,))),
    "sum": (operator.add, (X, X)),
    "scalar": (operator.mul, (X, 2)),
    "ratio": (operator.truediv, (X, 0.5)),
    "layer": (nn.Conv2d(4, 4, 1), (X,)),
    "broadcast": (operator.add, (X[:, :1].contiguous(), X)),
    "promotion": (operator.add, (X, X.double())),
    "layout": (operator.add, (X, X.mT)),
    "truth": (operator.add, (X, True)),
    "integers": (operator.truediv, (IDS, IDS)),
    "integer and scalar": (operator.mul, (IDS, 0.5)),
    "part": (nn.SiLU(), (X[:, ::2],)),
    "permuted": (nn.LayerNorm(4), (X.permute(0, 2, 3, 1),)),
    "expanded": (operator.mul, (X[:, :1].expand(-1, 4, -1, -1), 2)),
    "hook": (hooked(nn.SiLU()), (X,)),
    "hooked norm": (hooked(nn.BatchNorm2d(4).eval()), (X,)),
    "own forward": (replaced(nn.BatchNorm2d(4).eval()), (X,)),
    "no tensor before": (operator.add, (1, X)),
    "padding by words": (nn.Conv2d(4, 6, 3, padding="same"), (X,)),
    "reflection": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (X,)),
    "dilated": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2), (X,)),
    "channels last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (X,)),
    "nothing left": (nn.Conv2d(4, 6, 6, stride=9), (X,)),
    "in place": (torch.Tensor.add_, (X.clone(), 1)),
    "out": (lambda x: torch.add(x, 1, out=torch.empty(2, 4, 6, 6)), (X,)),
    "filled": (filled, (X,)),
    "several": (torch.max, (X, 1)),
    "attention": (F.scaled_dot_product_attention, (X, X, X)),
}


def forms(result):
    return [(t.shape, t.stride(), t.dtype, t.device) for t in pytree.tree_leaves(result)]


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_results_have_the_form_of_real_ones(name):
    function, args = CALLS[name]
    with DatalessMode() as mode:
        given = [mode.without_data(a) if isinstance(a, torch.Tensor) else a for a in args]
        without = function(*given)
        with torch.autocast("cpu", torch.bfloat16):
            cast = function(*given)
    assert all(isinstance(t, Dataless) for t in pytree.tree_leaves((without, cast)))
    assert forms(without) == forms(function(*args))
    with torch.autocast("cpu", torch.bfloat16):
        assert forms(cast) == forms(function(*args))


@torch.no_grad()
def test_views_lie_in_the_memory_of_what_they_show():
    with DatalessMode() as mode:
        x = mode.without_data(X)
        view, copy = x.flatten(1), x.permute(0, 2, 3, 1).flatten(1)
    assert storage(view) == storage(x) != storage(copy)


@torch.no_grad()
def test_what_is_made_of_other_tensors_alone_is_computed():
    with DatalessMode() as mode:
        table = torch.as_tensor([1.0, 2.0]) * 3
        made = torch.zeros(2) + 1
    assert table.tolist() == [3, 6]
    assert isinstance(made, Dataless)
    with mode, pytest.raises(NeedsData, match="writes images into a constant"):
        table.add_(mode.without_data(table))
    with mode, pytest.raises(NeedsData, match="resizes"):
        torch.add(mode.without_data(table), 1, out=torch.empty(0))


@pytest.mark.parametrize("question", [torch.Tensor.item, torch.Tensor.tolist, torch.nonzero, bool, torch.Tensor.numpy])
def test_values_are_asked_for_in_vain(question):
    with DatalessMode() as mode, pytest.raises((NeedsData, RuntimeError, NotImplementedError)):
        question(mode.without_data(torch.ones(1)))


@torch.no_grad()
def test_outside_of_its_mode_a_tensor_answers_still_and_in_another_it_is_refused():
    mode = DatalessMode()
    x = mode.without_data(X)
    assert (x.data + 1).mT.shape == X.mT.shape
    with DatalessMode(), pytest.raises(NeedsData, match="an earlier call"):
        x + 1
