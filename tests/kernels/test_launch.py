"""What a launch hands to Triton, and when Triton gets to look at the arguments: with kernels that only note it."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from meansparse_fx.kernels import composition, triton_launch
from meansparse_fx.kernels import launch as operator_launch
from meansparse_fx.kernels.composition import Wanted
from meansparse_fx.kernels.layout import is_laid_out_like, layout_of
from meansparse_fx.kernels.records import Options, Vectors
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


def test_other_threads_see_a_launch_when_all_of_it_is_there(monkeypatch) -> None:
    kernel = Kernel()
    own = launch(kernel)

    class Active:  # another thread's call while the first one looks up the driver
        @property
        def active(self):
            monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=stream_of_driver))
            own(X, None, Y)
            return stream_of_driver

    stream_of_driver = SimpleNamespace(get_current_stream=lambda index: 7)
    monkeypatch.setattr(triton_launch, "driver", Active())
    own(X, None, Y)
    own(X, None, Y)
    assert all(arguments[3] == 7 for arguments in kernel.ran)
    assert len(kernel.looked) + len(kernel.ran) == 3


def test_first_calls_of_several_threads_take_turns() -> None:
    """Triton 3.6 puts a kernel where other threads find it before it has been loaded."""

    class Slow(Kernel):
        loading = together = 0

        def __getitem__(self, grid):
            def call(*arguments, **constexprs):
                self.loading += 1
                self.together = max(self.together, self.loading)
                time.sleep(0.01)
                self.loading -= 1
                return Kernel.__getitem__(self, grid)(*arguments, **constexprs)

            return call

    kernel, barrier = Slow(), threading.Barrier(4)

    def work(mode):
        own = launch(kernel, MODE=mode)
        barrier.wait()
        own(X, None, Y)
        own(X, None, Y)

    threads = [threading.Thread(target=work, args=(mode,)) for mode in ("mean", "mean", "edge", "smooth")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernel.together == 1
    assert len(kernel.looked) + len(kernel.ran) == 8


@pytest.mark.parametrize("capturing", [False, True])
def test_a_first_call_in_a_graph_capture_says_what_to_do(capturing, monkeypatch) -> None:
    class Refused(Kernel):
        def __getitem__(self, grid):
            raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the model once" if capturing else "^Triton Error") as caught:
        launch(Refused())(X, None, Y)
    assert (caught.value.__cause__ is not None) == capturing
    launch(Kernel())(X, None, Y)  # and nobody waits for ever


def test_the_stream_is_that_of_each_call(monkeypatch) -> None:
    kernel, streams = Kernel(), iter("abc")
    active = SimpleNamespace(get_current_stream=lambda index: next(streams))
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    own = launch(kernel)
    for _ in range(4):
        own(X, None, Y)
    assert [arguments[3] for arguments in kernel.ran] == ["a", "b", "c"]


def test_another_current_device_is_left_for_the_launch(monkeypatch) -> None:
    kernel = Kernel()
    own = launch(kernel)
    own(X, None, Y)
    current = [0]

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], own._index
        yield
        current[0] = before

    own._several, own._index = True, 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    own._run = lambda *arguments: seen.append((current[0], arguments[3]))
    own(X, None, Y)
    current[0] = 1
    own(X, None, Y)
    assert seen == [(1, ("stream", 1))] * 2
    assert current == [1]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {  # of what stands beside x, and of x itself
    "alike": (lambda t: t, lambda t: t),
    "x in channels_last": (lambda t: t, lambda t: t.to(memory_format=torch.channels_last)),
    "x in slabs": (lambda t: t, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]),
    "x full of gaps": (lambda t: t, lambda t: torch.stack([t, t], 4)[..., 0]),
    "broadcast": (lambda t: t[:1], lambda t: t),
}


class Composed:
    """Stands for a launch: what it is handed must lie as a kernel reads it, and is computed by torch operators."""

    def __init__(self, options, kernel, given, layout, numbers, constexprs, device):
        self.kernel, self.given, self.layout, self.options = kernel, list(given), layout, options
        assert (numbers[0], *numbers[-2:]) == (options.steepness, options.input_eps, options.sum_eps)
        assert constexprs["VARIANT"] == options.variant

    def __call__(self, x, first, second, *rest):
        count = len(Vectors._fields)
        others, vectors = rest[:-count], Vectors(*rest[-count:])
        assert self.given == [i for i, t in enumerate((x, first, second, *rest)) if t is not None]
        assert all(t is None or is_laid_out_like(t, first) for t in (second, *others))
        assert all(v is None or v.is_contiguous() for v in vectors)
        walked = layout_of(tuple(x.shape), x.stride(), first.stride(), 1, x.element_size())
        assert walked == self.layout
        if self.kernel is operator_launch.forward_kernel:
            found = composition.forward(x, *others, vectors, self.options)
        else:
            found = composition.backward(x, *others, vectors, self.options, wanted=Wanted(second is not None))
        first.copy_(found[0])
        if second is not None:
            second.copy_(found[1])


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_launch_is_handed_lies_as_kernels_read_it(name, fused, second, monkeypatch) -> None:
    """With vectors that have gaps; results have the dtype and memory format of x."""
    beside, own = LAYOUTS[name]
    options = Options(1, "silu", variant="edge", steepness=3.0, want_sum=second, input_eps=0.2, sum_eps=0.1)
    monkeypatch.setattr(operator_launch, "Launch", lambda *given: Composed(options, *given))
    shape = 3, 4, 6, 2
    x, grad, *others = own(normal(0, *shape)), *(beside(normal(seed, *shape)) for seed in (1, 2, 3))
    first, last = others if fused else (None, None)
    vectors = Vectors(*normal(4, 2, 4, 2).abs()[..., 0], *([None, *normal(5, 9, 4).abs()] if fused else ()))
    run = operator_launch.forward_runner(vectors, options, x, first, last)
    expected = composition.forward(x, first, last, vectors, options)
    for found, wanted in zip(run(vectors, x, first, last), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    wanted = Wanted(second)
    rest = vectors, options, x, grad.expand(shape), first, last
    run = operator_launch.backward_runner(*rest, False, wanted)
    expected = composition.backward(x, grad.expand(shape), first, last, vectors, options, wanted=wanted)
    for found, wanted in zip(run(vectors, x, grad.expand(shape), first, last), expected, strict=False):
        torch.testing.assert_close(found, wanted)


def test_double_precision_is_left_to_torch() -> None:
    vectors = Vectors(torch.zeros(8), torch.ones(8))
    with pytest.raises(TypeError, match=r"take float32, float16 or bfloat16, not torch\.float64"):
        operator_launch.forward_runner(vectors, Options(1), X.double(), None, None)


def test_what_no_kernel_can_count_has_no_launch() -> None:
    x = torch.empty(2**12, 2**12, 2**10, device="meta", dtype=torch.float16)
    vectors, options = Vectors(*torch.zeros(2, 2**12, device="meta")), Options(1)
    assert operator_launch.forward_runner(vectors, options, x, None, None) is None
    assert operator_launch.backward_runner(vectors, options, x, x, None, None, False, Wanted()) is None
    assert operator_launch.forward_runner(vectors, options, x[:4], None, None) is not None
