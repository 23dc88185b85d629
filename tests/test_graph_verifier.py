"""The verifier that looks at every graph a pass leaves: planted faults are found."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meansparse_fx as msfx
from meansparse_fx import rewrite
from meansparse_fx.nn import MeanSparse


def forget_a_module(sparse, graph):
    del sparse._modules["unused"]


def repeat_an_operator(sparse, graph):
    node, _ = rewrite.calls_of(sparse, MeanSparse)[0]
    rewrite.insert_module_after(node, str(node.target))


def leave_a_node(sparse, graph):
    node, _ = rewrite.calls_of(sparse, MeanSparse)[0]
    with graph.inserting_after(node):
        graph.call_function(torch.abs, (node,))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (forget_a_module, "changed the state_dict"),
        (repeat_an_operator, "several operators at one site"),
        (leave_a_node, "nobody reads"),
    ],
)
def test_planted_faults_are_found(net, images, fault, found):
    sparse = msfx.transform(net, images)
    with pytest.raises(AssertionError, match=found), rewrite.editing(sparse, "planted") as graph:
        fault(sparse, graph)


class ReadsAgain(nn.Module):
    """Overwrites what it reads again."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.conv, self.activation = nn.Conv2d(3, 4, 3), F.relu_ if fused else torch.tanh_

    def forward(self, x):
        y = self.conv(x)
        return (self.activation(y) + y).mean((2, 3))


@pytest.mark.parametrize("fused", [True, False])
def test_a_bypassed_reader_is_found(images, monkeypatch, fused):
    model = ReadsAgain(fused).eval()
    msfx.transform(model, images)
    monkeypatch.setattr(sys.modules["meansparse_fx.passes.sparsify"], "redirect_later_readers", lambda *_: None)
    with pytest.raises(AssertionError, match="in the place of an in-place call"):
        msfx.transform(model, images)


def test_new_nodes_say_which_pass_made_them(net, images):
    sparse = msfx.transform(net, images, fuse="all")
    made = {str(node.target): node.meta.get("pass") for node in sparse.graph.nodes if node.op == "call_module"}
    assert made["meansparse.gelu"] == "sparsify"
    assert made["conv1"] is None
