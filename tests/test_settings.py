"""What makes a transformed model the function it is, in a state_dict, a pickle or a file."""

from __future__ import annotations

import copy
import io
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import BackendCompilerFailed

import meansparse_fx as msfx
from meansparse_fx import settings
from meansparse_fx.errors import ArtifactError, EvaluationError, StateError, StatisticsError
from meansparse_fx.export import export
from meansparse_fx.operators import added, answers


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.flip(3).split(5), progress=False)
    msfx.set_alpha(sparse, 0.3)
    return sparse


def fresh(net, images):
    """Another transformed model, with other settings everywhere."""
    other = msfx.transform(net, images)
    msfx.set_variant(other, "smooth", "layer", 3.0)
    msfx.set_backward(other, "smooth", 4.0)
    return other


def check_same(got, expected, images):
    """Values and input gradients, bit for bit."""
    results = []
    for model in (got, expected):
        x = images.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def set_strict(model):
    for operator in msfx.operators(model).values():
        operator.strict = True
    msfx.set_alpha(model, 0.3)


SWITCHES = {
    "edge": lambda m: msfx.set_variant(m, "edge"),
    "zero": lambda m: msfx.set_variant(m, centre="zero"),
    "smooth": lambda m: msfx.set_variant(m, "smooth", steepness=5.0),
    "strict": set_strict,
    "identity": lambda m: msfx.set_backward(m, "identity"),
    "smooth backward": lambda m: msfx.set_backward(m, "smooth", 2.0),
    "by site": lambda m: msfx.set_alpha(m, {"relu": 0.5, "gelu": 0.1}),
}


@pytest.fixture(params=SWITCHES)
def switched(request, sparse):
    SWITCHES[request.param](sparse)
    return sparse


def through_safetensors(state, path):
    save_file(state, path / "s")
    return load_file(path / "s")


def through_torch(state, path):
    torch.save(state, path / "s")
    return torch.load(path / "s", weights_only=True)


@pytest.mark.parametrize("way", [through_safetensors, through_torch])
def test_state_dict_is_the_function(net, images, switched, tmp_path, way):
    other = fresh(net, images)
    other.load_state_dict(way(switched.state_dict(), tmp_path))
    check_same(other, switched, images)
    for name, operator in msfx.operators(other).items():
        assert operator.switches() == msfx.operators(switched)[name].switches()
        assert torch.equal(operator.threshold, msfx.operators(switched)[name].threshold)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assigned_state_is_the_models_own(net, images, sparse, device):
    msfx.set_variant(sparse, "edge", "layer")
    msfx.set_backward(sparse, "smooth", 7.0)
    other = fresh(net, images).to(device)
    state = sparse.state_dict()
    other.load_state_dict(state, assign=True)
    assert all(operator.gate_steepness.item() == 7 for operator in msfx.operators(other).values())
    check_same(other, sparse, images)
    msfx.set_alpha(other, 0.1)
    assert msfx.get_alpha(sparse) == 0.3
    assert not torch.equal(other(images), sparse(images))


def test_state_dicts_without_the_switches_are_refused(net, images, sparse):
    state = {k: v for k, v in sparse.state_dict().items() if not k.endswith("_extra_state")}
    with pytest.raises(RuntimeError, match=r"meansparse\.relu\._extra_state"):
        msfx.transform(net, images).load_state_dict(state)


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"[]", b"{}", b'{"alpha": "x"}'])
def test_damaged_switches_are_refused(net, images, sparse, damaged):
    state = sparse.state_dict()
    key = next(key for key in state if key.endswith("_extra_state"))
    state[key] = torch.tensor(list(damaged), dtype=torch.uint8)
    with pytest.raises(StateError, match="_extra_state is damaged"):
        fresh(net, images).load_state_dict(state)


def test_state_dicts_of_later_releases_are_refused(net, images, sparse):
    state, key = sparse.state_dict(), "meansparse.relu._extra_state"
    written = json.loads(bytes(state[key].tolist())) | {"soft": 1}
    state[key] = torch.tensor(list(json.dumps(written).encode()), dtype=torch.uint8)
    with pytest.raises(StateError, match=r"relu: settings of another release .*\(soft\)"):
        msfx.transform(net, images).load_state_dict(state)


@pytest.mark.parametrize("alpha", [0.2, 0.35, 1 / 3, 1e-9, 0.1 + 0.2])
def test_alpha_is_the_number_that_was_given(net, images, sparse, alpha):
    msfx.set_alpha(sparse, alpha)
    assert msfx.get_alpha(sparse) == alpha
    assert msfx.get_alpha(copy.deepcopy(sparse)) == alpha
    other = fresh(net, images)
    other.load_state_dict(sparse.state_dict())
    assert msfx.get_alpha(other) == alpha
    msfx.operators(sparse)["relu"].alpha.fill_(0.7)  # not by set_alpha
    assert msfx.get_alpha(sparse)["relu"] == 0.7


WRITES = {
    "alpha": lambda o: o.alpha.fill_(0.7),
    "mean": lambda o: o.mean.add_(1),
    "std, detached": lambda o: o.std.detach().mul_(2),
    "threshold": lambda o: o.threshold.fill_(0.5),
    "centre, another tensor": lambda o: setattr(o, "centre", torch.ones_like(o.centre)),
    "past torch's count": lambda o: o.alpha.data.fill_(0.7),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("copier", [lambda model: model, copy.deepcopy])
def test_buffers_written_to_directly_are_refused(images, sparse, write, copier, tmp_path):
    """Of alpha nothing became of it, a threshold was in no file: silently."""
    sparse = copier(sparse)
    msfx.set_alpha(sparse, 0.2)
    operator, refused = msfx.operators(sparse)["relu"], "relu: its buffers were written to, .* call meansparse_fx.set_a"
    operator.mean.copy_(operator.mean.clone())  # nothing else than before
    expected = sparse(images)
    WRITES[write](operator)
    if write != "past torch's count":
        with pytest.raises(StateError, match=refused):
            sparse(images)
    for verb in (lambda: msfx.save(sparse, tmp_path / "a"), lambda: export(sparse, images, tmp_path / "b.pt2")):
        with pytest.raises(StateError, match=refused):
            verb()
    msfx.set_statistics(sparse, added(sparse).statistics)
    msfx.set_alpha(sparse, 0.2)
    assert torch.equal(sparse(images), expected)


@pytest.mark.parametrize("copier", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_weights_loaded_without_their_statistics_are_refused_until_calibrated(net, images, sparse, copier, tmp_path):
    sparse = copier(sparse)
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    sparse.load_state_dict(net.state_dict(), strict=False)
    sparse(images)  # those that were measured
    sparse.load_state_dict(other.state_dict(), strict=False)
    runs = sparse, torch.compile(sparse, backend="eager"), lambda images: msfx.save(sparse, tmp_path / "a")
    for run in runs:
        with pytest.raises(StateError, match="measured on other weights: calibrate the model again"):
            run(images)
    msfx.calibrate(sparse, [images], progress=False)
    again = msfx.transform(other, images, statistics=msfx.calibrate(msfx.transform(other, images), [images]))
    for model in (sparse, again):
        msfx.set_alpha(model, 0.2)
    assert torch.equal(sparse(images), again(images))


def test_weights_loaded_through_a_wrapper_are_refused_too(net, images, sparse):
    wrapper, other = torch.nn.Sequential(torch.nn.Identity(), sparse), copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)

    def load(weights):
        wrapper.load_state_dict({f"1.{key}": value for key, value in weights.state_dict().items()}, strict=False)

    load(net)
    wrapper(images)  # those that were measured
    load(other)
    with pytest.raises(StateError, match="measured on other weights: calibrate the model again"):
        wrapper(images)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("fuse", ["activation", "all"])
def test_torch_save_keeps_the_plan(net, images, fuse):
    placement = msfx.Placement(exclude=("slope",), predicate=lambda site: True)  # which cannot be pickled
    sparse = msfx.transform(net.requires_grad_(False), images, placement=placement, fuse=fuse)
    stats = msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.3)
    loaded = pickled(pickled(sparse))
    assert str(msfx.inspect(loaded)) == str(msfx.inspect(sparse))
    assert torch.equal(loaded(images), sparse(images))
    again = msfx.calibrate(loaded, [images], progress=False)
    assert again.table == stats.table
    assert again.table["relu"]["after"] == "batch_norm"
    assert all(torch.equal(again[name].m2, stats[name].m2) for name in stats)
    assert torch.equal(msfx.restore(loaded)(images), net(images))
    with pytest.raises(StateError, match="transformed"):
        msfx.transform(loaded, images)


def test_file_is_the_model(net, images, switched, tmp_path):
    msfx.save(switched, tmp_path / "a")
    loaded = msfx.load(tmp_path / "a", net, images)
    check_same(loaded, switched, images)
    assert msfx.get_alpha(loaded) == msfx.get_alpha(switched)
    assert str(msfx.inspect(loaded)) == str(msfx.inspect(switched))
    msfx.save(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    msfx.save(pickled(switched), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("double", [False, True])
def test_file_of_a_model_whose_statistics_came_otherwise(net, images, sparse, tmp_path, double):
    """From a state_dict: no calibration is known, and what the operators hold is kept to the last bit."""
    if double:
        net, images, sparse = net.double(), images.double(), sparse.double()
    other = msfx.transform(net, images)
    other.load_state_dict(sparse.state_dict())
    for operator in msfx.operators(other).values():
        operator.std.mul_(1.1)
    msfx.set_alpha(other, 0.7)
    msfx.save(other, tmp_path / "a")
    check_same(msfx.load(tmp_path / "a", net, images), other, images)
    kept = msfx.Statistics.load(tmp_path / "a")
    assert (kept.images, kept["relu"].count) == (0, 0)
    with pytest.raises(StatisticsError, match="not known"):
        kept.merge(kept)


@pytest.mark.parametrize("part", ["mean", "std"])
def test_statistics_changed_at_one_site_are_those_of_no_calibration(net, images, sparse, tmp_path, part):
    stats = msfx.calibrate(sparse, [images], progress=False)
    getattr(msfx.operators(sparse)["relu"], part).mul_(1.1)
    msfx.set_alpha(sparse, 0.7)
    msfx.save(sparse, tmp_path / "a")
    check_same(msfx.load(tmp_path / "a", net, images), sparse, images)
    kept = msfx.Statistics.load(tmp_path / "a")
    assert (kept.images, kept.metadata, len(kept.marks)) == (0, {}, 0)
    assert (kept["relu"].count, kept["slope"].count) == (0, stats["slope"].count)


def test_settings_of_another_version_are_refused(net, images, sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "VERSION", "2")
    msfx.save(sparse, tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="settings of version 2; this release reads 1"):
        msfx.load(tmp_path / "a", net, images)
    assert msfx.Statistics.load(tmp_path / "a").keys() == msfx.operators(sparse).keys()


def test_file_serves_as_statistics(net, images, sparse, tmp_path):
    stats = msfx.calibrate(sparse, [images], progress=False)
    msfx.save(sparse, tmp_path / "a")
    kept = msfx.Statistics.load(tmp_path / "a")
    assert (kept.images, kept.metadata, kept.table) == (12, stats.metadata, stats.table)
    other = msfx.transform(net, images, statistics=tmp_path / "a", alpha=0.3)
    assert torch.equal(other(images), sparse(images))
    stats.save(tmp_path / "b")
    with pytest.raises(ArtifactError, match="holds statistics and no settings"):
        msfx.load(tmp_path / "b", net, images)
    with pytest.raises(StateError, match="leave out placement"):
        msfx.transform(net, images, settings=tmp_path / "a", statistics=stats)


def test_file_keeps_placement_and_fusion(net, images, tmp_path):
    placement = msfx.Placement(exclude=("slope",), predicate=lambda site: site.name != "relu_1")
    sparse = msfx.transform(net.requires_grad_(False), images, placement=placement, fuse="all")
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.4)
    msfx.save(sparse, tmp_path / "a")
    loaded = msfx.load(tmp_path / "a", net, images)
    check_same(loaded, sparse, images)
    assert str(msfx.inspect(loaded)) == str(msfx.inspect(sparse))
    assert list(msfx.operators(loaded)) == ["relu", "gelu"]
    net.requires_grad_(True)
    fused = r"first differing site is relu \(.*fused: norm.*: what is fused depends on which parameters want gradients"
    with pytest.raises(StateError, match=fused):
        msfx.load(tmp_path / "a", net, images)


def other_weights(net):
    with torch.no_grad():
        net.slope.weight[0] += 1


def one_site_more(net):
    net.conv2 = torch.nn.Sequential(net.conv2, torch.nn.ReLU())


def other_activation(net):
    net.relu = torch.nn.SiLU()


OTHER_MODELS = {
    "weights": (other_weights, r"other weights; the first differing site is slope, behind slope.weight: load the"),
    "site": (one_site_more, r"first differing site is relu_1 \(relu, .*in the file and conv2.1 \(relu, 8"),
    "activation": (other_activation, r"first differing site is relu \(relu, 8 .* in the file and relu \(silu, 8"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_file_is_refused_on_another_model(net, images, sparse, tmp_path, kind):
    change, message = OTHER_MODELS[kind]
    msfx.save(sparse, tmp_path / "a")
    change(net)
    with pytest.raises(StateError, match=message):
        msfx.load(tmp_path / "a", net.eval(), images)


def test_what_cannot_be_saved(net, images, sparse, tmp_path):
    with pytest.raises(StateError, match=r"relu: no statistics: calibrate .* before save"):
        msfx.save(msfx.transform(net, images), tmp_path / "a")
    with pytest.raises(StateError, match="no MeanSparse operators"):
        msfx.save(net, tmp_path / "a")
    with pytest.raises(StateError, match="not a wrapper"):
        msfx.save(torch.nn.Sequential(sparse), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def train_a_little(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def test_statistics_of_weights_that_were_trained_since(net, images, labels, sparse, tmp_path):
    attack = {"attacks": ["pgd"], "steps": 1, "sanity_images": 0, "progress": False}
    statistics, path = added(sparse).statistics, tmp_path / "own.safetensors"
    train_a_little(sparse, images, labels)
    others = "the weights are not those that the statistics were measured on: calibrate"
    with pytest.raises(StateError, match=f"^{others} the model again, or take .*check_weights=False"):
        msfx.save(sparse, path)
    assert not path.exists()
    (check,) = (c for c in msfx.evaluate(sparse, (images, labels), **attack).checks if c.name == "calibration data")
    assert not check.passed
    assert check.finding.startswith(others)
    with pytest.warns(UserWarning, match=f"^select_alpha: {others}"):
        msfx.select_alpha(sparse, (images, labels), alphas=[0.3], attacks=["pgd"], steps=1, progress=False)
    msfx.set_statistics(sparse, statistics, check_weights=False)
    msfx.save(sparse, path)
    trained = copy.deepcopy(msfx.restore(sparse))
    check_same(msfx.load(path, trained, images), sparse, images)
    with pytest.raises(StateError, match="settings of a model with other weights"):
        msfx.load(path, net, images)


def test_statistics_of_weights_in_another_precision_are_theirs(images, sparse, tmp_path):
    sparse.double()
    msfx.save(sparse, tmp_path / "own.safetensors")
    msfx.save(sparse.bfloat16(), tmp_path / "own.safetensors")


def test_patterns_of_alpha(net, images, sparse):
    msfx.set_alpha(sparse, 0.0)
    msfx.set_alpha(sparse, {"relu": 0.4})  # a site's name is that site alone
    assert msfx.get_alpha(sparse) == {"relu": 0.4, "relu_1": 0.0, "slope": 0.0, "gelu": 0.0}
    msfx.set_alpha(sparse, {"relu": 0.1, "r.lu|gelu": 0.2, "^relu_[0-9]$": 0.3})
    assert msfx.get_alpha(sparse) == {"relu": 0.1, "relu_1": 0.3, "slope": 0.0, "gelu": 0.2}
    for unknown in ("layer[12]", "relu("):
        with pytest.raises(StateError, match="no such site"):
            msfx.set_alpha(sparse, {"relu": 0.5, unknown: 0.1})
    assert msfx.get_alpha(sparse)["relu"] == 0.1


def test_statistics_of_more_sites_serve_a_subset(net, images, sparse):
    stats = msfx.calibrate(sparse, [images], progress=False)
    fewer = msfx.transform(net, images, placement=msfx.Placement(include=("relu",)), statistics=stats, alpha=0.3)
    msfx.set_alpha(sparse, {"slope|gelu": 0})
    assert torch.equal(fewer(images), sparse(images))
    residual = msfx.transform(net, images, placement=msfx.Placement(kinds=("activation", "residual_sum")))
    more = msfx.calibrate(residual, [images], progress=False)
    assert torch.equal(msfx.transform(net, images, statistics=more)(images), net(images))
    del stats.sites["relu"]
    with pytest.raises(StatisticsError, match=r"lack 1 site.*: relu"):
        msfx.transform(net, images, placement=msfx.Placement(include=("relu",)), statistics=stats)


SEARCH = {"eps": 0.03, "steps": 1, "attacks": ("apgd-ce/exact",), "progress": False}


@pytest.fixture
def chosen(sparse, images, labels):
    """A model whose alpha was chosen on the first eight images."""
    search = msfx.select_alpha(sparse, (images[:8], labels[:8]), alphas=(0.2, 0.3), **SEARCH)
    search.apply(sparse)
    msfx.set_alpha(sparse, 0.3)
    return sparse


def found(evaluation):
    return {
        c.name: (c.passed, c.finding) for c in evaluation.checks if c.name in ("threat of the choice", "unseen images")
    }


def test_evaluate_says_what_the_choice_saw(net, images, labels, chosen, tmp_path):
    msfx.save(chosen, tmp_path / "a")
    loaded = msfx.load(tmp_path / "a", net, images)
    for model in (chosen, loaded, pickled(chosen)):
        options = SEARCH | {"sanity_images": 0, "batch_size": 3}
        assert found(msfx.evaluate(model, (images[8:], labels[8:]), **options)) == {
            "threat of the choice": (True, "alpha was looked for under Linf eps 0.03"),
            "unseen images": (True, "0 of 4 images were used to choose alpha"),
        }
        again = found(msfx.evaluate(model, (images[6:], labels[6:]), **options | {"eps": 0.05}))
        assert [passed for passed, _ in again.values()] == [False, False]
        assert "eps 0.03, and this is Linf eps 0.05" in again["threat of the choice"][1]
        assert again["unseen images"][1].startswith("2 of 6 images were used to choose alpha")


def test_a_choice_that_kept_no_marks_claims_nothing_of_images(images, labels, chosen):
    del added(chosen).choice["marks"]  # searches of earlier versions kept digests of another kind
    assert list(found(msfx.evaluate(chosen, (images, labels), **SEARCH, sanity_images=0))) == ["threat of the choice"]


def test_no_choice_no_checks_of_it(images, labels, sparse):
    assert not found(msfx.evaluate(sparse, (images, labels), **SEARCH, sanity_images=0))


def test_a_checkpoint_of_another_run_says_what_differs(images, labels, sparse, tmp_path):
    options = SEARCH | {"sanity_images": 0, "checkpoint": tmp_path / "c"}
    msfx.evaluate(sparse, (images, labels), **options)
    with pytest.raises(EvaluationError, match=r"attack settings differ \(eps was 0.03 and is 0.04\)"):
        msfx.evaluate(sparse, (images, labels), **options | {"eps": 0.04})
    msfx.set_alpha(sparse, 0.2)
    with pytest.raises(EvaluationError, match=r"alphas or variants differ \(alpha was 0.3 and is 0.2\)"):
        msfx.evaluate(sparse, (images, labels), **options)


def test_other_weights_behind_the_last_site_are_named(net, images, sparse, tmp_path):
    msfx.save(sparse, tmp_path / "a")
    with torch.no_grad():
        net.head.weight[0] += 1
    with pytest.raises(StateError, match=r"other weights; 1 of its tensors differ, head\.weight first"):
        msfx.load(tmp_path / "a", net, images)


class Scaled(torch.nn.Module):
    """One set of weights, many functions."""

    def __init__(self, slope=0.1, eps=1e-5, stride=1, mean=0.5, twice=False, hooked=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = torch.nn.Conv2d(1, 4, 3, stride=stride), torch.nn.BatchNorm2d(4, eps=eps)
        self.act, self.head = torch.nn.LeakyReLU(slope), torch.nn.Linear(4, 3)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.twice = twice
        if hooked:
            self.head.register_forward_hook(lambda *_: None)

    def forward(self, x):
        h = self.act(self.bn(self.conv(x - self.mean)))
        return {"logits": self.head((h + h.flip(1) if self.twice else h).mean((2, 3)))}


@pytest.mark.parametrize(
    "other", [{"slope": 0.3}, {"eps": 0.1}, {"stride": 2}, {"mean": 0.2}, {"twice": True}], ids=str
)
def test_settings_of_another_function_with_the_same_weights_are_refused(other, tmp_path):
    images = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    model, path = Scaled().eval(), tmp_path / "own.safetensors"
    sparse = msfx.transform(model, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.3)
    before = sparse(images)["logits"]
    msfx.save(sparse, path)
    assert torch.equal(sparse(images)["logits"], before)
    for size in (9, 12):
        again = msfx.load(path, Scaled(hooked=size == 9).eval(), torch.rand(2, 1, size, size))
        assert torch.equal(again(images)["logits"], before)
    with pytest.raises(StateError, match=r"own.safetensors: settings of another model; .* same weights and sites"):
        msfx.load(path, Scaled(**other).eval(), images)
    with pytest.raises(StatisticsError, match=r"these statistics are of another model; .* same weights and sites"):
        msfx.transform(Scaled(**other).eval(), images, statistics=path)
    msfx.set_statistics(msfx.transform(Scaled(**other).eval(), images), path, check_weights=False)
    options = {"statistics": path, "inner": "eager", "alpha": 0.3}
    got = torch.compile(model, backend="meansparse", options=options)(images)["logits"]
    torch.testing.assert_close(got, before)
    with pytest.raises(
        BackendCompilerFailed, match=r"these statistics are of another model; .* same weights and sites"
    ):
        torch.compile(Scaled(**other).eval(), backend="meansparse", options=options)(images)


@pytest.mark.parametrize(("outputs", "step"), [(640, 20), (33, 1), (63, 1), (65, 2)])
def test_answers_are_some_64_of_the_outputs_for_a_fixed_pattern(outputs, step):
    """As every release asks a model, and every file has kept: pixel k of two images is the fraction of k / 1.3247."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, outputs), torch.nn.ReLU()).eval()
    pattern = np.arange(96) * 0.7548776662466927 % 1
    with torch.no_grad():
        expected = model(torch.tensor(pattern, dtype=torch.float32).view(2, 3, 4, 4)).flatten()[::step]
    found = answers(model, (3, 4, 4))
    assert (found.shape, found.exact) == ((3, 4, 4), True)
    assert found.values == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["mean", "std", "alpha", "threshold"])
def test_what_is_written_past_torchs_counting_is_noticed_before_it_is_saved(name, tmp_path):
    images = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    sparse = msfx.transform(Scaled().eval(), images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.3)
    msfx.save(sparse, tmp_path / "s")  # looked at once
    next(iter(msfx.operators(sparse).values())).get_buffer(name).data.add_(0.25)
    with pytest.raises(StateError, match="its buffers were written to"):
        msfx.save(sparse, tmp_path / "s")


def test_what_a_random_or_changing_model_answers_is_kept_for_nothing(tmp_path):
    images = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(0))

    class Noisy(Scaled):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    class Counting(Scaled):
        def forward(self, x):
            self.mean += 0.1
            return super().forward(x)

    sparse = msfx.transform(Noisy().eval(), images)
    assert msfx.calibrate(sparse, [images], progress=False).answers is None
    sparse = msfx.transform(Counting().eval(), images)
    stats = msfx.calibrate(sparse, [images], progress=False)
    counted = float(sparse.mean)
    msfx.set_statistics(sparse, stats, check_weights=True)
    msfx.save(sparse, tmp_path / "own.safetensors")
    assert float(sparse.mean) == counted
