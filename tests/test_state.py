"""State: what forward does to buffers, parameters and attributes is the base's, and capturing leaves no trace of it."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import meansparse_fx as msfx
from meansparse_fx.capture import capture
from meansparse_fx.errors import CaptureError, EvaluationError, StateError
from meansparse_fx.settings import Settings
from meansparse_fx.state import kept_random_state
from tests.models import Functional

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.change = change
        self.register_buffer("seen", torch.full((4,), 0.5))

    def forward(self, x):
        h = self.conv(x)
        before = self.seen
        self.change(self, h.detach().mean((0, 2, 3)))
        return F.relu(h - self.seen[:, None, None]) * before.exp()[:, None, None]


def added(model, mean):
    model.seen += mean


def assigned(model, mean):
    model.seen = 0.9 * model.seen + 0.1 * mean


def assigned_twice(model, mean):
    model.seen.mul_(0.5)
    model.seen = model.seen + mean
    model.seen = model.seen * 2


def in_place(model, mean):
    model.seen.mul_(0.9).add_(mean, alpha=0.1)


def by_data(model, mean):
    model.seen.data.add_(mean)


def by_index(model, mean):
    model.seen[1:3] = mean[1:3]


def counted(model, mean):
    model.seen += 1


CHANGES = [added, assigned, assigned_twice, in_place, by_data, by_index, counted]


@pytest.mark.parametrize("change", CHANGES)
def test_buffers_that_forward_changes_are_the_bases(change):
    model = Counting(change).eval()
    start = model.seen.clone()
    sparse = msfx.transform(model, IMAGES)
    assert torch.equal(model.seen, start)
    assert torch.equal(sparse.seen, start)
    for _ in range(3):
        a, b = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
        expected, actual = model(a), sparse(b)
        expected.square().sum().backward()
        actual.square().sum().backward()
        assert torch.equal(actual, expected)
        assert torch.equal(b.grad, a.grad)
        assert torch.equal(sparse.seen, model.seen)
    assert not torch.equal(model.seen, start)
    assert torch.equal(copy.deepcopy(sparse)(IMAGES), model(IMAGES))


def test_a_buffer_that_gets_another_shape_is_refused():
    def wider(model, mean):
        model.spare = mean[:1]

    model = Counting(wider).eval()
    model.register_buffer("spare", torch.zeros(3))
    with pytest.raises(CaptureError, match=r"forward gives spare a value that no graph does: write spare\.copy_"):
        capture(model, IMAGES)


def test_a_number_that_forward_counts_is_named():
    def counting(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return F.relu(x) * self.calls

    model = Functional(counting).eval()
    model.calls = 0
    with pytest.raises(CaptureError, match="It gives calls new values whenever it runs, which no graph does"):
        capture(model, IMAGES)
    assert model.calls == 0


def test_what_an_earlier_forward_left_is_not_taken_for_this_ones():
    def keeping(self, x):
        self.kept = F.relu(self.conv(x))
        return self.kept * 2

    model = nn.Sequential(Functional(keeping, conv=nn.Conv2d(3, 4, 3))).eval()
    with torch.no_grad():
        model(IMAGES)
    sparse = msfx.transform(model, IMAGES)
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    with pytest.raises(AttributeError, match="kept"):
        _ = sparse.get_submodule("0").kept


def test_gradients_of_parameters_are_left_alone():
    def attacking(self, x):
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            F.relu(self.conv(z)).square().sum().backward()
        return F.relu(self.conv(x + z.grad))

    model = Functional(attacking, conv=nn.Conv2d(3, 4, 3)).eval()
    model(IMAGES)
    before = model.conv.weight.grad.clone()
    with pytest.raises(CaptureError, match=r"symbolic trace stopped in Functional at .*test_state.py"):
        capture(model, IMAGES)
    assert type(model.conv.weight.grad) is torch.Tensor
    assert torch.equal(model.conv.weight.grad, before)


@pytest.mark.parametrize("buffer", [torch.ones(1).expand(4), torch.eye(4).to_sparse()], ids=["expanded", "sparse"])
def test_buffers_that_are_not_one_value_a_place_are_left_alone(buffer):
    def forward(self, x):
        mean = F.relu(self.conv(x)).mean((2, 3))
        return mean + self.own if self.own.layout is torch.strided else (self.own @ mean.t()).t()

    model = Functional(forward, conv=nn.Conv2d(3, 4, 3)).eval()
    model.register_buffer("own", buffer)
    sparse = msfx.transform(model, IMAGES)
    assert torch.equal(sparse(IMAGES), model(IMAGES))
    assert torch.equal(sparse.own.to_dense(), buffer.to_dense())


@pytest.mark.parametrize(("device", "kept"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_random_numbers_are_put_back_where_the_images_are(device, kept, monkeypatch):
    """Those of the CPU always; of all GPUs that one's, for asking the others would take their memory."""
    asked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(devices) or fork([]))
    before = torch.get_rng_state()
    with kept_random_state(torch.device(device)):
        torch.rand(3)
    assert asked == [kept]
    assert torch.equal(torch.get_rng_state(), before)


def sparse_at(alpha):
    torch.manual_seed(0)
    sparse = msfx.transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), IMAGES)
    msfx.calibrate(sparse, IMAGES, progress=False)
    msfx.set_alpha(sparse, alpha)
    return sparse


@pytest.mark.parametrize("name", ["mean", "std", "alpha", "centre", "threshold"])
def test_buffers_of_operators_that_want_gradients_are_refused(name):
    sparse = sparse_at(0.4)
    sparse(IMAGES)
    wanting = getattr(msfx.operators(sparse)["1"], name).requires_grad_()
    for call in (lambda: msfx.save(sparse, "nowhere"), lambda: sparse(IMAGES)) if name == "alpha" else ():
        with pytest.raises(StateError, match="1: no gradient reaches alpha"):
            call()
    with pytest.raises(StateError, match=f"1: no gradient reaches {name}: call its requires_grad_"):
        msfx.select_alpha(sparse, (IMAGES, [0] * 4), progress=False)
    wanting.requires_grad_(False)
    sparse(IMAGES)


def test_operators_called_with_anothers_state():
    here, there = sparse_at(0.0), sparse_at(0.9)  # as often written to: torch counts the same
    state = {
        key: value
        for key, value in there.state_dict().items()
        if isinstance(value, Tensor) and value.dtype != torch.uint8
    }
    alpha = {"meansparse.1.alpha": torch.tensor(0.9)}

    def call(state, x):
        return functional_call(here, state, (x,))

    for refused in (
        lambda: call(state, IMAGES),
        lambda: call(alpha, IMAGES),
        lambda: vmap(lambda x: call(state, x[None])[0])(IMAGES),
        lambda: vmap(lambda a: call({"meansparse.1.alpha": a}, IMAGES))(torch.tensor([0.0, 0.9])),
        lambda: vmap(call, (0, None))({key: torch.stack([value] * 2) for key, value in state.items()}, IMAGES),
    ):
        with pytest.raises(StateError, match="1: its buffers were written to, of which some follow from others"):
            refused()
    with pytest.raises(StateError, match="no gradient reaches alpha"):
        grad(lambda a: call({"meansparse.1.alpha": a}, IMAGES).sum())(torch.tensor(0.9))
    everything = dict(there.named_buffers()) | dict(there.named_parameters())
    assert torch.equal(call(everything, IMAGES), there(IMAGES))
    ensemble = {
        key: torch.stack([value, everything[key]]) for key, value in (*here.named_buffers(), *here.named_parameters())
    }
    assert torch.allclose(
        vmap(call, (0, None))(ensemble, IMAGES), torch.stack([here(IMAGES), there(IMAGES)]), atol=1e-6
    )
    assert not torch.allclose(here(IMAGES), there(IMAGES), atol=1e-3)


@pytest.mark.parametrize("strict", [False, True])
def test_compiled_operators_are_what_is_written_into_them(strict):
    torch._dynamo.reset()
    expected, other, written = sparse_at(0.9), sparse_at(0.4), sparse_at(0.4)
    for model in (expected, other, written):
        msfx.operators(model)["1"].strict = strict
    compiled = torch.compile(written, backend="aot_eager")
    assert torch.allclose(compiled(IMAGES), other(IMAGES), atol=1e-6)
    msfx.operators(written)["1"].alpha.fill_(0.9)  # eager calls refuse it
    assert torch.allclose(compiled(IMAGES), expected(IMAGES), atol=1e-6)
    state = {key: value for key, value in expected.state_dict().items() if value.dtype != torch.uint8}
    called = torch.compile(lambda x: functional_call(other, state, (x,)), backend="aot_eager")
    assert torch.allclose(called(IMAGES), expected(IMAGES), atol=1e-6)
    assert not torch.allclose(other(IMAGES), expected(IMAGES), atol=1e-3)


@pytest.mark.parametrize(
    ("default", "back"),
    [
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
    ],
    ids=["meta", "float64", "bfloat16"],
)
def test_torchs_defaults_change_nothing(default, back, tmp_path):
    expected, labels = sparse_at(0.9), torch.zeros(4, dtype=torch.int64)
    base = msfx.restore(expected)
    msfx.save(expected, tmp_path / "before")
    default()
    try:
        sparse = msfx.transform(base, IMAGES)
        msfx.calibrate(sparse, IMAGES, progress=False)
        msfx.set_alpha(sparse, 0.9)
        msfx.save(sparse, tmp_path / "after")
        loaded = msfx.load(tmp_path / "before", base, IMAGES)
        alone = Settings.load(tmp_path / "before").state_dict()
        for verb in (msfx.evaluate, msfx.select_alpha):
            with pytest.raises(EvaluationError, match="attacks compute in float32 and draw on the CPU"):
                verb(sparse, (IMAGES, labels), logits=lambda maps: maps.mean((2, 3)), progress=False)
    finally:
        back()
    assert torch.equal(sparse(IMAGES), expected(IMAGES))
    assert torch.equal(loaded(IMAGES), expected(IMAGES))
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in alone.items())
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


@pytest.mark.parametrize("calibrated", [False, True])
def test_base_weights_loaded_after_statistics_that_a_state_dict_brought(calibrated):
    there = sparse_at(0.9)
    other = {key: value + 0.1 for key, value in msfx.restore(there).state_dict().items()}
    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    here = msfx.transform(base, IMAGES)
    if calibrated:
        msfx.calibrate(here, IMAGES, progress=False)
    here.load_state_dict(there.state_dict())
    assert torch.equal(here(IMAGES), there(IMAGES))
    here.load_state_dict(base.state_dict() if calibrated else other, strict=False)
    with pytest.raises(StateError, match="lacks the operators' statistics, which were measured on other weights"):
        here(IMAGES)
    msfx.calibrate(here, IMAGES, progress=False)
    here(IMAGES)
    fresh = msfx.transform(base, IMAGES)
    fresh.load_state_dict(other, strict=False)  # nothing is measured yet
    fresh(IMAGES)


def test_a_model_that_nobody_holds_is_freed():
    for kept in (torch.overrides.get_ignored_functions, torch.overrides._get_overridable_functions):
        kept.cache_clear()  # as in a process that captures its first model
    model = Functional(lambda self, x: F.relu(self.conv(x)), conv=nn.Conv2d(3, 4, 3)).eval()
    weight = weakref.ref(model.conv.weight)
    msfx.transform(model, IMAGES)
    del model
    gc.collect()
    assert weight() is None
