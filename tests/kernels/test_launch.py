"""What a launch hands to Triton, and when Triton gets to look at the arguments: with kernels that only note it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from meansparse_fx.kernels import triton_launch
from meansparse_fx.kernels.layout import layout_of
from meansparse_fx.kernels.triton_launch import Launch

X, Y = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4)


class Kernel:
    """Notes the calls that go Triton's way, and those of the compiled kernel it returns."""

    def __init__(self):
        self.looked, self.ran = [], []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        return lambda *arguments, **constexprs: (self.looked.append((grid, arguments, constexprs)), self)[1]

    def run(self, *arguments):
        self.ran.append(arguments)


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda index: ("stream", index))
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_launch, "_COMPILED", {})


def launch(kernel, x=X, given=(0, 2), **constexprs):
    layout = layout_of(tuple(x.shape), x.stride(), x.stride(), 1, x.element_size())
    return Launch(kernel, given, layout, (10.0,), constexprs, x.device)


def test_triton_looks_once_and_then_gets_pointers() -> None:
    kernel = Kernel()
    own = launch(kernel, MODE="mean")
    for _ in range(3):
        own(X, None, Y)
    assert len(kernel.looked) == 1
    (_, arguments, constexprs) = kernel.looked[0]
    assert arguments[:3] == (X, None, Y)
    assert next(iter(constexprs)) == "MODE"
    assert len(kernel.ran) == 2
    sizes = own._rest
    expected = (own.grid, 1, 1, ("stream", None), "function", "metadata", None, None, None)
    assert kernel.ran[0] == (*expected, X.data_ptr(), None, Y.data_ptr(), *sizes)
    # What Triton was shown by name, the compiled kernel gets in the same order.
    assert sizes == (*arguments[3:], *[v for k, v in constexprs.items() if k not in ("num_warps", "enable_fp_fusion")])


def test_other_sizes_share_the_compiled_kernel_and_other_kinds_do_not() -> None:
    kernel = Kernel()
    launch(kernel)(X, None, Y)
    launch(kernel, X[:1])(X[:1], None, Y[:1])
    assert (len(kernel.looked), len(kernel.ran)) == (1, 1)
    half, channels_last = X.bfloat16(), X.to(memory_format=torch.channels_last)
    launch(kernel, half)(half, None, half)
    launch(kernel, MODE="edge")(X, None, Y)
    launch(kernel, channels_last)(channels_last, None, channels_last)
    launch(kernel, given=(0, 1, 2))(X, X, Y)
    assert (len(kernel.looked), len(kernel.ran)) == (5, 1)


def test_unaligned_pointers_go_tritons_way() -> None:
    kernel = Kernel()
    own = launch(kernel)
    odd = torch.zeros(X.numel() + 1)[1:].view(X.shape)
    own(odd, None, Y)  # and what was compiled for it is not kept
    own(X, None, Y)
    own(X, None, Y)
    own(X, None, odd)
    assert (len(kernel.looked), len(kernel.ran)) == (3, 1)


def test_who_listens_to_launches_hears_all(monkeypatch) -> None:
    kernel = Kernel()
    own = launch(kernel)
    own(X, None, Y)
    heard = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print]))
    monkeypatch.setattr(triton_launch, "_runtime", heard)
    own(X, None, Y)
    heard.launch_enter_hook.calls.clear()
    own(X, None, Y)
    assert (len(kernel.looked), len(kernel.ran)) == (2, 1)
