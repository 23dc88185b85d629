"""What only a GPU can show: graphs, streams, devices, alignment, sizes beyond 32 bits, threads, whole models.

Without one every line runs all the same, interpreted on the CPU, with stubs in the place of what CUDA alone has: that
shows the tests to be right, not the GPU. The oracle is torch in float64, by formulas that share no code with the
package.
"""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meansparse_fx as msfx
from meansparse_fx.kernels import elementwise, launch, layout, moments, operator, ops, triton_launch
from meansparse_fx.kernels.operator import Operator
from meansparse_fx.kernels.records import Options, Vectors

CUDA = torch.cuda.is_available()
# What libraries have to say on a GPU is shown, and is no reason to leave out what they compute.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default" if CUDA else "error")]

# Relative, of single roundings; the interpreter truncates to bfloat16.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if CUDA else 8e-3}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "elu": F.elu, "identity": lambda s: s}


class Graph:
    """Stands for a CUDA graph, which replays nothing."""

    def replay(self) -> None: ...


@pytest.fixture(autouse=True)
def _platform(monkeypatch):
    monkeypatch.setenv("MEANSPARSE_FX_LOWERING", "auto" if CUDA else "triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not CUDA:
        _stub_cuda(monkeypatch)


def _stub_cuda(monkeypatch) -> None:
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(wait_stream=lambda _: None))
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name in ("synchronize", "_sleep", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))


@pytest.fixture
def first_calls(monkeypatch):
    """No kernel was called before."""
    monkeypatch.setattr(triton_launch, "_COMPILED", {})
    monkeypatch.setattr(operator, "_RUNNERS", {})
    if CUDA:
        for kernel in (elementwise.forward_kernel, elementwise.backward_kernel, moments.moments_kernel):
            monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))


def odd_eighths(shape, seed: int, device="cpu", dtype=torch.float32) -> Tensor:
    """Odd multiples of 1/8 below 4: exact in every dtype, and never at the edge of a band of quarters."""
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(-16, 16, tuple(shape), generator=g) + 1).div(8).to(device, dtype)


def band(channels: int, seed: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Centre and threshold in quarters; the band of every third channel is off."""
    g = torch.Generator().manual_seed(seed)
    centre, threshold = (torch.randint(low, 5, (channels,), generator=g) / 4 for low in (-4, 0))
    threshold[::3] = -1
    return centre.to(device), threshold.to(device)


def oracle(x, centre, threshold, activation, upstream, channel_dim=1) -> tuple[Tensor, Tensor]:
    """y and the gradient of x in float64."""
    along = [-1 if d == channel_dim else 1 for d in range(x.dim())]
    leaf = x.detach().double().requires_grad_()
    centre, threshold = (v.double().view(along) for v in (centre, threshold))
    y = ACTIVATIONS[activation](torch.where((leaf - centre).abs() <= threshold, centre, leaf))
    (gradient,) = torch.autograd.grad(y, leaf, upstream.double())
    return y.detach(), gradient


def value_and_gradient(own, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = own(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    return y.detach(), gradient


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for own, right in zip(found, expected, strict=True):
        rtol = TOLERANCES[own.dtype]
        torch.testing.assert_close(own.double(), right.to(own.device), rtol=rtol, atol=5e-6)


def captured(step):
    """Return what replays ``step`` from a CUDA graph and returns its results, always the same tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay():
        graph.replay()
        if not CUDA:
            for result, value in zip(results, step(), strict=True):
                result.copy_(value)
        return results

    return replay


# The operator by itself.

SHAPE = (3, 8, 5, 6)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_replayed_operator_reads_what_its_tensors_hold_by_then(activation, dtype, device):
    x, upstream = (odd_eighths(SHAPE, seed, device, dtype) for seed in (0, 1))
    centre, threshold = band(8, 2, device)
    own = Operator(Vectors(centre, threshold), Options(1, activation))
    replay = captured(lambda: value_and_gradient(own, x, upstream))
    for seed in (3, 4, 5):
        x.copy_(odd_eighths(SHAPE, seed))
        for vector, value in zip((centre, threshold), band(8, seed + 10), strict=True):
            vector.copy_(value)
        assert_close(replay(), oracle(x, centre, threshold, activation, upstream))


def first_call_in_a_capture(device: str) -> bool:
    """Capture an operator that was never called; return whether that was refused, with the cure in the message."""
    x, vectors = odd_eighths(SHAPE, 0, device), Vectors(*band(8, 1, device))
    own, graph = Operator(vectors, Options(1, "elu")), torch.cuda.CUDAGraph()
    said, y = [], None
    try:
        with torch.cuda.graph(graph):
            y = own(x)
    except RuntimeError as error:  # the capture's own end may raise another one after it
        cause: BaseException | None = error
        while cause is not None:
            said.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        assert any("call the model once" in text for text in said), said
    else:
        graph.replay()
        assert_close((y, y), (oracle(x, *vectors[:2], "elu", x)[0],) * 2)
    assert_close((own(x),) * 2, (oracle(x, *vectors[:2], "elu", x)[0],) * 2)
    return bool(said)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_first_call_in_a_capture_is_right_or_says_what_to_do(refuses, device, monkeypatch):
    if CUDA:  # in a process of its own, which a failed capture may leave in any state
        if refuses:
            pytest.skip("the driver decides")
        command = f"import runpy; print(runpy.run_path({__file__!r})['first_call_in_a_capture']('cuda'))"
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] in ("True", "False")
        return
    if refuses:
        states = iter([True])

        class Refused:
            def __getitem__(self, grid):
                if next(states, False):
                    raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
                return elementwise.forward_kernel[grid]

        monkeypatch.setattr(launch, "forward_kernel", Refused())
        monkeypatch.setattr(operator, "_RUNNERS", {})
        for name in ("is_initialized", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
    assert first_call_in_a_capture(device) == refuses


def test_kernels_run_on_the_stream_of_their_caller(device):
    """Launched on another one, they would read NaN: what is copied over it comes some milliseconds later."""
    sources = [odd_eighths(SHAPE, seed, device) for seed in range(6)]
    vectors = Vectors(*band(8, 1, device))
    own, streams = Operator(vectors, Options(1, "gelu")), [torch.cuda.Stream(), torch.cuda.Stream()]
    value_and_gradient(own, sources[0], sources[0])
    torch.cuda.synchronize()
    results = []
    for turn, source in enumerate(sources):
        x, upstream = torch.full_like(source, torch.nan), torch.full_like(source, torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[turn % 2]):
            torch.cuda._sleep(10_000_000)
            x.copy_(source)
            upstream.copy_(source)
            results.append(value_and_gradient(own, x, upstream))
            torch.full_like(source, torch.nan)  # in what memory was given back
    torch.cuda.synchronize()
    for source, found in zip(sources, results, strict=True):
        assert_close(found, oracle(source, *vectors[:2], "gelu", source))


def test_inputs_freed_at_once_are_read_before_their_memory_is_reused(device):
    source, vectors = odd_eighths((4, 64, 32, 32) if CUDA else SHAPE, 0, device), Vectors(*band(64 if CUDA else 8, 1))
    vectors = Vectors(*(v.to(device) for v in vectors[:2]))
    own, streams = Operator(vectors, Options(1, "silu")), [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(value_and_gradient(own, source.clone(), source.clone()))
            source.new_full(source.shape, torch.nan)
    torch.cuda.synchronize()
    expected = oracle(source, *vectors[:2], "silu", source)
    for found in results:
        assert_close(found, expected)


def test_a_device_that_is_not_the_current_one(device, first_calls):
    if CUDA and torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    own = {}
    for turn, place in enumerate(["cuda:1", "cuda:0", "cuda:1", "cuda:0"] if CUDA else ["cpu"] * 4):
        vectors = Vectors(*band(8, turn, place))
        x, upstream = (odd_eighths(SHAPE, seed, place) for seed in (turn, turn + 4))
        call = own.setdefault(place, Operator(vectors, Options(1, "gelu")))
        assert_close(value_and_gradient(call, x, upstream), oracle(x, *call.vectors[:2], "gelu", upstream))
        _, mean, _ = ops.channel_moments(x, 1)
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        assert str(mean.device) == place


@pytest.mark.parametrize("odd_first", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channel_dim", [1, 3])
def test_pointers_of_any_alignment(channel_dim, dtype, odd_first, device, first_calls):
    """Vectors of 16 bytes read from another address are a fault on a GPU, or other elements."""
    shape = (3, 8, 5, 16)
    count, channels = 3 * 8 * 5 * 16, shape[channel_dim]
    flat, flat_upstream = (odd_eighths((count + 8,), seed, device, dtype) for seed in (0, 1))
    flat_centre, flat_threshold = (torch.cat([v, v]) for v in band(channels, 2, device))
    for turn in range(4):
        at = (turn + odd_first) % 2
        x, upstream = (t[at : at + count].view(shape) for t in (flat, flat_upstream))
        assert (x.data_ptr() % 16 == 0) == (at == 0)
        for start in (at, 0):
            vectors = Vectors(*(v[start : start + channels] for v in (flat_centre, flat_threshold)))
            own = Operator(vectors, Options(channel_dim, "gelu"))
            expected = oracle(x, *vectors[:2], "gelu", upstream, channel_dim)
            assert_close(value_and_gradient(own, x, upstream), expected)
        _, mean, _ = ops.channel_moments(x, channel_dim)
        others = [d for d in range(4) if d != channel_dim]
        torch.testing.assert_close(mean, x.double().mean(others), rtol=1e-5, atol=1e-6)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "empty": lambda x: x[:0],
    "one": lambda x: x[:1, :, :1, :1],
}


@pytest.mark.parametrize("upstream_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_through_autograd(name, upstream_layout, device):
    x = LAYOUTS[name](odd_eighths(SHAPE, 0, device))
    upstream = odd_eighths(SHAPE, 1, device)[: x.shape[0], :, : x.shape[2], : x.shape[3]]
    if x.numel():
        upstream = LAYOUTS[upstream_layout](upstream)
    vectors = Vectors(*band(8, 2, device))
    found = value_and_gradient(Operator(vectors, Options(1, "gelu")), x, upstream)
    assert_close(found, oracle(x, *vectors[:2], "gelu", upstream))


BEYOND_32_BITS = {  # shape of more than 2^31 elements, and a small one of the same kind; channel_dim, slices
    "rows": ((2100, 1000, 32, 32), (6, 4, 3, 4), 1, False),
    "pairs": ((21500, 2048, 7, 7), (6, 4, 7, 7), 1, False),
    "columns": ((2100, 32, 32, 1000), (6, 3, 4, 16), 3, False),
    "slabs": ((2100, 1000, 32, 32), (6, 4, 2, 4), 1, True),
}


@pytest.mark.parametrize("name", BEYOND_32_BITS)
def test_more_than_2_to_31_elements(name, device, monkeypatch):
    large, small, channel_dim, sliced = BEYOND_32_BITS[name]
    shape, dtype = torch.Size(large if CUDA else small), torch.bfloat16
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("wants 40 GiB")
    monkeypatch.setattr(layout, "INT32_ELEMENTS", layout.INT32_ELEMENTS if CUDA else 0)
    for function in (layout.layout_of, moments.tiles_of):
        function.cache_clear()
    monkeypatch.setattr(operator, "_RUNNERS", {})
    channels = shape[channel_dim]
    stored = torch.empty(shape[0], 2 * channels, *shape[2:], dtype=dtype, device=device) if sliced else None
    x = torch.empty(shape, dtype=dtype, device=device) if stored is None else stored[:, :channels]
    pattern = odd_eighths((32749 if CUDA else 61,), 0, device, dtype)  # a prime: no two parts are alike
    part = -(-shape[0] // 32)
    for start in range(0, shape[0], part):
        piece = x[start : start + part]
        ahead = torch.arange(start, start + piece.numel(), device=device) % len(pattern)
        piece.copy_(pattern[ahead].view(piece.shape))
    assert x.numel() > 2**31 or not CUDA
    vectors = Vectors(*band(channels, 1, device))
    own = Operator(vectors, Options(channel_dim, "relu"))
    found = value_and_gradient(own, x, x)
    others = [d for d in range(4) if d != channel_dim]
    total = squares = torch.zeros(channels, dtype=torch.float64, device=device)
    for start in range(0, shape[0], part):
        piece = x[start : start + part]
        results = tuple(t[start : start + part] for t in found)
        assert_close(results, oracle(piece, *vectors[:2], "relu", piece, channel_dim))
        total = total + piece.double().sum(others)
        squares = squares + piece.double().square().sum(others)
    del found, results
    count, mean, m2 = ops.channel_moments(x, channel_dim)
    assert count == x.numel() // channels
    torch.testing.assert_close(mean, total / count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2, squares - total**2 / count, rtol=1e-5, atol=1e-6)
    for function in (layout.layout_of, moments.tiles_of):
        function.cache_clear()


def test_first_calls_in_the_thread_of_autograd(device, first_calls):
    """On a GPU a backward runs in a thread of its own, which has neither a context nor a current device yet."""
    x, vectors = odd_eighths(SHAPE, 0, device), Vectors(*band(8, 1, device))
    leaf, threads = x.clone().requires_grad_(), []
    y = Operator(vectors, Options(1, "silu"))(leaf)
    y.register_hook(lambda grad: threads.append(threading.get_ident()))
    (gradient,) = torch.autograd.grad(y, leaf, x)
    assert_close((y.detach(), gradient), oracle(x, *vectors[:2], "silu", x))
    assert (threads != [threading.get_ident()]) == CUDA


def on_streams(work, inputs):
    """Return the result of work for each input, in threads with a stream each, all at once."""
    torch.cuda.synchronize()

    def own(given):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = work(given)
        torch.cuda.synchronize()
        return found

    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(own, inputs))


def test_first_calls_of_many_threads_at_once(device, first_calls):
    vectors, barrier = Vectors(*band(8, 1, device)), threading.Barrier(8)
    own = Operator(vectors, Options(1, "elu"))
    inputs = [odd_eighths((1 + turn // 2, *SHAPE[1:]), turn, device) for turn in range(8)]

    def work(x):
        barrier.wait(60)
        return [value_and_gradient(own, x, x) for _ in range(5)]

    for x, several in zip(inputs, on_streams(work, inputs), strict=True):
        for found in several:
            assert_close(found, oracle(x, *vectors[:2], "elu", x))


# Whole models.


WEIGHTS = torch.linspace(-1, 1, 5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.GELU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


class Case:
    """A calibrated model on a device, and what float64 on a CPU says of it."""

    def __init__(self, fuse: str, device: str, alpha: float = 0.4) -> None:
        torch.manual_seed(0)
        net = Net().eval().requires_grad_(False)
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
        net.norm.weight.uniform_(4, 8)
        net.norm.bias.normal_()
        self.images = torch.rand(4, 3, 6, 6).to(device)
        self.calibrated_on = torch.rand(16, 3, 6, 6)
        net.head.bias -= net(self.images.cpu()).mean(0)  # so that the classes differ from image to image
        self.net = net.to(device)
        u = self._before(self.calibrated_on).detach()
        self.mean, self.std = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0).sqrt()
        self.sparse = msfx.transform(self.net, self.images, fuse=fuse)
        batches = self.calibrated_on.to(device).split(6)
        self.statistics = msfx.calibrate(self.sparse, list(batches), progress=False)
        msfx.set_alpha(self.sparse, alpha)

    def _before(self, images: Tensor) -> Tensor:
        weight, bias = (t.detach().cpu().double() for t in (self.net.conv.weight, self.net.conv.bias))
        return self.normed(F.conv2d(images.cpu().double(), weight, bias, padding=1))

    def normed(self, v: Tensor) -> Tensor:
        norm = self.net.norm
        mean, variance, weight, bias = (
            t.detach().cpu().double().view(-1, 1, 1)
            for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return (v - mean) / (variance + self.net.norm.eps).sqrt() * weight + bias

    def expected(self, images: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Logits and the images' gradient of the logits times `WEIGHTS`."""
        leaf = images.detach().cpu().double().requires_grad_()
        u = self._before(leaf)
        centre, threshold = self.mean.view(-1, 1, 1), alpha * self.std.view(-1, 1, 1)
        distance = (u - centre).abs()
        near = ((distance - threshold).abs() < 5e-5) & (alpha > 0)
        assert not near.any(), "another seed: float32 may tip what is so near to the band's edge"
        inside = (distance <= threshold) & (alpha > 0)
        features = F.gelu(torch.where(inside, centre, u)).mean((2, 3))
        head = self.net.head
        logits = features @ head.weight.detach().cpu().double().T + head.bias.detach().cpu().double()
        (gradient,) = torch.autograd.grad(logits @ WEIGHTS.double(), leaf, torch.ones(len(images)).double())
        return logits.detach(), gradient

    def found(self, model=None, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        leaf = (self.images if images is None else images).detach().requires_grad_()
        logits = (model or self.sparse)(leaf)
        weights = WEIGHTS.to(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
        return logits.detach(), gradient

    def check(self, model=None, images: Tensor | None = None, alpha: float = 0.4) -> None:
        self.compare(self.found(model, images), images, alpha)

    def compare(self, found: tuple[Tensor, Tensor], images: Tensor | None = None, alpha: float = 0.4) -> None:
        for own, right in zip(found, self.expected(self.images if images is None else images, alpha), strict=True):
            torch.testing.assert_close(own.cpu().double(), right, rtol=1e-3, atol=1e-5)


@pytest.fixture(params=["activation", "all"])
def case(request, device) -> Case:
    return Case(request.param, device)


def images_like(case: Case, seed: int) -> Tensor:
    return torch.rand(case.images.shape, generator=torch.Generator().manual_seed(seed)).to(case.images)


def test_calibration_is_that_of_the_numbers_on_a_cpu(case):
    case.check()
    found = case.statistics["act"]
    assert found.count == 16 * 36
    torch.testing.assert_close(found.mean.cpu().double(), case.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std.cpu().double(), case.std, rtol=1e-5, atol=0)
    observed = msfx.restore(case.sparse)
    case.check(observed, alpha=0.0)


def test_a_replayed_model_reads_alpha_and_images_as_they_are_by_then(case):
    replay = captured(case.found)
    for seed, alpha in ((5, 0.4), (6, 0.2), (7, 0.0), (8, 0.6)):
        case.images.copy_(images_like(case, seed))
        msfx.set_alpha(case.sparse, alpha)
        case.compare(replay(), alpha=alpha)


def test_a_replayed_model_reads_its_norm_as_it_is_by_then(case):
    replay = captured(case.found)
    case.compare(replay())
    for model in (case.net, case.sparse):
        norm = model.get_submodule("norm")
        norm.weight.data.mul_(0.9)  # which autograd does not count
        norm.running_var.data.add_(0.1)
    case.compare(replay())
    case.check()


def test_copies_and_pickles_are_models_of_their_own(case):
    case.check()
    for copied in (copy.deepcopy(case.sparse), pickle.loads(pickle.dumps(case.sparse))):
        msfx.set_alpha(copied, 0.1)
        case.check(copied, alpha=0.1)
        case.check()


def test_a_model_moves_after_it_was_called(device):
    case = Case("all", "cpu")
    case.check()
    for place in (device, "cpu", device):
        case.net.to(place)
        case.sparse.to(place)
        case.check(images=case.images.to(place))


def test_autocast(case, device):
    seen = []
    (own,) = msfx.operators(case.sparse).values()
    handle = own.register_forward_hook(lambda module, given, y: seen.append((given[0].double(), y)))
    with torch.autocast(device, torch.bfloat16):
        _, gradient = case.found()
    handle.remove()
    ((u, y),) = seen
    if own.prologue.input_norm is not None:  # it was given what the convolution returned
        u = case.normed(u.cpu()).to(device)
    assert y.dtype == torch.bfloat16
    centre, threshold = (t.to(device).view(-1, 1, 1) for t in (case.mean, 0.4 * case.std))
    distance = (u - centre).abs()
    far = (distance - threshold).abs() > 1e-4
    expected = F.gelu(torch.where(distance <= threshold, centre, u))
    assert far.double().mean() > 0.95
    torch.testing.assert_close(y.double()[far], expected[far], rtol=TOLERANCES[torch.bfloat16], atol=1e-5)
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() > gradient.numel() / 2


def test_threads_share_one_model(case, first_calls):
    inputs = [images_like(case, seed)[: 1 + seed % 3] for seed in range(41, 49)]
    results = on_streams(lambda images: [case.found(images=images) for _ in range(3)], inputs)
    for images, several in zip(inputs, results, strict=True):
        for found in several:
            case.compare(found, images)


def test_reduce_overhead(case, monkeypatch):
    if not CUDA:
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    torch._dynamo.reset()
    compiled = torch.compile(case.sparse, mode="reduce-overhead")
    for alpha in (0.4, 0.4, 0.4, 0.2, 0.0):  # warmed up, recorded, replayed
        msfx.set_alpha(case.sparse, alpha)
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(error_on_recompile=True):
            case.check(compiled, alpha=alpha)


@pytest.mark.slow
def test_evaluation_with_recorded_graphs_finds_what_the_model_does(device, monkeypatch):
    """Images are broken on the way and left out, so that batches shrink."""
    case = Case("all", device)
    if not CUDA:
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    torch._dynamo.reset()
    images = torch.cat([images_like(case, seed) for seed in range(30, 36)])
    labels = case.expected(images, 0.0)[0].argmax(1).to(images.device)
    options = {"steps": 5, "progress": False, "eps": 0.03, "attacks": ("apgd-ce",), "sanity_images": 0}
    plain, fast = (
        msfx.evaluate(case.sparse, (images, labels), compile=c, **options) for c in (None, "reduce-overhead")
    )
    for which in ("base", "sparse"):
        worst = getattr(plain, which).worst
        assert 0 < int(worst.sum()) < len(images), "another eps: nothing is left out"
        assert int((worst ^ getattr(fast, which).worst).sum()) <= 2, "rounding may tip an image"


def test_nothing_of_a_model_is_left_when_it_is_gone(device):
    def use():
        case = Case("all", device)
        case.check()
        case.sparse(case.images)
        tensors = [*case.sparse.parameters(), *case.sparse.buffers(), *case.net.parameters(), case.images]
        return [weakref.ref(t) for t in tensors]

    use()  # libraries keep workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    left = use()
    gc.collect()
    assert [tensor() for tensor in left if tensor() is not None] == []
    assert torch.cuda.memory_allocated() <= before
