"""The attacks of our own and the graph they look through, against hooks, formulas and known radii."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.errors import EvaluationError
from meansparse_fx.evaluate import descent
from meansparse_fx.evaluate.attacks import ATTACKS, VERSIONS, AttackSettings, attack, attack_kind, expand
from meansparse_fx.evaluate.plan import plan_runs
from meansparse_fx.passes.reveal import reveal


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.4)
    return sparse


def seen_by_hooks(sparse, images):
    """Return the operators' inputs, copied when they are called, and the result."""
    found, handles = {}, []
    for name, operator in msfx.operators(sparse).items():
        handles.append(
            operator.register_forward_pre_hook(lambda m, args, name=name: found.update({name: args[0].clone()}))
        )
    result = sparse(images)
    for handle in handles:
        handle.remove()
    return found, result


def test_revealed_graph_gives_inputs_and_masks_beside_the_same_result(sparse, images, sites):
    result, seen = reveal(sparse)(images)
    inputs, expected = seen_by_hooks(sparse, images)
    assert torch.equal(result, expected)
    assert list(seen) == list(sites)
    for name, (z, mask) in seen.items():
        operator = msfx.operators(sparse)[name]
        assert torch.equal(z, inputs[name])
        shape = [-1 if d == operator.channel_dim else 1 for d in range(z.dim())]
        mean, std = operator.mean.view(shape).double(), operator.std.view(shape).double()
        distance = (z.double() - mean).abs() - 0.4 * std
        clear = distance.abs() > 1e-6  # float32 and float64 may differ on the very edge
        assert torch.equal(mask[clear], (distance <= 0)[clear])
        assert 0 < mask.double().mean() < 1


def test_revealed_graph_follows_alpha_and_changes_nothing(sparse, images):
    code, revealed = sparse.code, reveal(sparse)
    msfx.set_alpha(sparse, 0.0)
    result, seen = revealed(images)
    assert torch.equal(result, sparse(images))
    assert not any(mask.any() for _, mask in seen.values())
    assert sparse.code == code
    assert set(revealed.state_dict()) == set(sparse.state_dict())


def test_a_base_reveals_nothing(sparse, images):
    base = msfx.restore(sparse)
    result, seen = reveal(base)(images)
    assert seen == {}
    assert torch.equal(result, base(images))


@pytest.mark.parametrize("power", [1, 2])
def test_objective_is_equation_8(sparse, images, labels, power):
    """Against the sum over the sites written out, with inputs from hooks and masks from the definition."""
    moved = (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    weight = 7.0
    adaptive = descent.Adaptive(sparse, AttackSettings(0.1, steps=5), power)
    _, value = adaptive._penalised(images, weight)(moved, labels)
    clean, _ = seen_by_hooks(sparse, images)
    after, logits = seen_by_hooks(sparse, moved)
    penalty, features = torch.zeros(len(images)), 0
    for name, operator in msfx.operators(sparse).items():
        shape = [-1 if d == operator.channel_dim else 1 for d in range(clean[name].dim())]
        mask = (clean[name] - operator.centre.view(shape)).abs() <= operator.threshold.view(shape)
        change = (mask * (clean[name] - after[name])).flatten(1)
        penalty += torch.linalg.vector_norm(change, power, dim=1) ** power
        features += change.shape[1]
    expected = F.cross_entropy(logits, labels, reduction="none") - weight / features * penalty
    # float32 sums over a few thousand features, in another order.
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert (penalty > 0).all()


def test_adaptive_without_penalty_is_pgd(sparse, images, labels, monkeypatch):
    monkeypatch.setattr(descent, "PENALTIES", (0.0,))
    settings = AttackSettings(0.05, steps=8, seed=3)
    pgd, adaptive = descent.PGD(sparse, settings), descent.Adaptive(sparse, settings, 2)
    assert torch.equal(pgd.perturb(images, labels), adaptive.perturb(images, labels))


def test_the_penalty_keeps_features_in_their_bands(sparse, images):
    """What the attacker asked for: with a weight that rules, the masked features move less than under PGD."""
    labels = sparse(images).argmax(1)
    revealed = reveal(sparse)
    with torch.no_grad():
        clean = revealed(images)[1]

    def moved(weight):
        settings = AttackSettings(0.05, steps=20)
        adaptive = descent.Adaptive(sparse, settings, 2)
        torch.manual_seed(0)
        x = settings.project(images, images + adaptive._start(images))
        for _ in range(20):
            x.requires_grad_()
            _, value = adaptive._penalised(images, weight)(x, labels)
            (gradient,) = torch.autograd.grad(value.sum(), x)
            x = settings.project(images, x.detach() + descent.STEP * 0.05 * gradient.sign())
        with torch.no_grad():
            seen = revealed(x)[1]
        return sum(float((((z - seen[n][0]) * mask) ** 2).sum()) for n, (z, mask) in clean.items())

    assert moved(1e5) < 0.5 * moved(0.0)


class Linear(nn.Module):
    """Margin w . x + b between two classes, so that the distance to the boundary is known."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(1, 27, generator=generator))

    def forward(self, x):
        margin = (x.flatten(1) - 0.5) @ self.weight.T
        return torch.cat([margin, -margin], 1)


LINEAR = ("apgd-ce", "pgd", "fab", "fab-t", "apgd-ce-r5", "apgd-ce-eot20")  # DLR needs more classes


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", LINEAR)
def test_gradient_attacks_find_the_known_radius(name, norm):
    model = Linear().eval()
    x = 0.5 + 0.2 * (torch.rand(200, 3, 3, 3, generator=torch.Generator().manual_seed(1)) - 0.5)  # far from 0 and 1
    with torch.no_grad():
        margin = model(x)[:, 0]
        dual = model.weight.abs().sum() if norm == "Linf" else model.weight.norm()
    distance = margin.abs() / dual
    eps = float(distance.median())
    labels = (margin < 0).long()
    found = attack(name, model, x, labels, AttackSettings(eps=eps, norm=norm, steps=50))
    broken = model(found).argmax(1) != labels
    clear = (distance / eps - 1).abs() > 0.02  # a finite number of steps gets so near
    assert torch.equal(broken[clear], (distance < eps)[clear])
    assert clear.sum() > 180


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_keeps_to_its_ball_and_is_repeatable(sparse, images, name, norm):
    labels = sparse(images).argmax(1)
    settings = AttackSettings(eps=0.1 if norm == "Linf" else 1.0, norm=norm, steps=3, queries=5, seed=4)
    starts = images + settings.eps / 50 if name == "apgd-start" else None
    first, second = (attack(name, sparse, images, labels, settings, None, starts) for _ in range(2))
    distance = (first - images).flatten(1)
    assert (distance.abs().amax(1) if norm == "Linf" else distance.norm(dim=1)).max() <= settings.eps + 1e-5
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, second)
    assert len(attack(name, sparse, images[:0], labels[:0], settings)) == 0


def test_targeted_attacks_take_the_classes_there_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 5)).eval()
    x = torch.rand(6, 3, 3, 3)
    for name in ("apgd-t", "fab-t"):
        assert attack(name, model, x, model(x).argmax(1), AttackSettings(eps=0.01, steps=2)).shape == x.shape


@pytest.mark.parametrize("name", [name for name in ATTACKS if not attack_kind(name).reads_graph])
def test_an_attack_takes_as_few_classes_as_its_loss_does(name):
    """The loss itself, which sorts the logits, fails with fewer."""
    x, row = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), attack_kind(name)
    starts = x if row.started else None
    for classes in (2, 3, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, classes)).eval()
        labels, settings = model(x).argmax(1), AttackSettings(0.01, steps=2, queries=2, target_classes=classes - 1)
        try:
            built = row.build(model, settings)
            built.perturb_from(x, x, labels) if row.started else built.perturb(x, labels)
            fits = True
        except IndexError:
            fits = False
        if fits:
            assert len(attack(name, model, x, labels, settings, None, starts)) == 4
        else:
            with pytest.raises(EvaluationError, match=rf"{name} needs at least \d classes"):
                attack(name, model, x, labels, settings, None, starts)


class MeanOfPixels(nn.Module):
    """Two classes: the mean of an image against a half; keeps the means of what it was asked a gradient of."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        if x.requires_grad:
            self.asked.append([round(mean, 1) for mean in x.detach().flatten(1).mean(1).tolist()])
        mean = x.flatten(1).mean(1)
        return torch.stack([mean, 1 - mean], 1)


def test_nearest_goes_on_with_the_images_that_came_nearest_and_survived(monkeypatch):
    margins = []
    dlr_loss = descent.Nearest.dlr_loss
    monkeypatch.setattr(descent.Nearest, "dlr_loss", lambda *args: margins.append(1) or dlr_loss(*args))
    x = torch.linspace(0.5, 0.95, 19)[:, None, None, None].expand(19, 1, 8, 8).contiguous()  # 0.025 apart
    y = torch.zeros(19, dtype=torch.long)
    model = MeanOfPixels()
    found = attack("apgd-nearest", model, x, y, AttackSettings(eps=0.06, steps=2))
    broken = found.flatten(1).mean(1) < 0.5
    assert broken.tolist() == [True] * 3 + [False] * 16  # 0.5, 0.525 and 0.55 are within eps
    assert torch.equal(found[~broken], x[~broken])
    sizes = [len(asked) for asked in model.asked]
    assert sizes == [19] * 11 + [3] * 8 * 11  # an eighth of 19 images, rounded up, in eight more descents of 10 steps
    assert len(margins) == 4 * 11  # every other of them on the margin
    # 0.575, 0.6 and 0.625 are next, each moved by 0.06 at most.
    assert all(0.5 <= mean <= 0.7 for asked in model.asked[11:] for mean in asked)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_versions_are_autoattacks_own(version, norm):
    """The same attacks, with the same restarts, classes, queries, steps and repeats."""
    from pyautoattack import AutoAttack

    def parameters(attacker):
        return {
            k: v
            for k, v in vars(attacker).items()
            if isinstance(v, int | float | str) and k not in ("verbose", "device")
        }

    theirs, model = AutoAttack(nn.Identity(), eps=0.1, norm=norm, seed=3, version=version), nn.Identity()
    built = {}
    for name in VERSIONS[version]:
        own = attack_kind(name).build(model, AttackSettings(eps=0.1, norm=norm, seed=3))
        built[plain := name.removesuffix("-r5").removesuffix("-eot20")] = own
        expected = getattr(theirs, {"apgd-t": "apgd_targeted"}.get(plain, plain.partition("-")[0]))
        set_when_run = {
            "apgd-ce": {"loss": "ce"},
            "apgd-dlr": {"loss": "dlr"},
            "fab": {"targeted": False},
            "fab-t": {"targeted": True, "n_restarts": 1},
        }
        assert parameters(own) == parameters(expected) | set_when_run.get(plain, {}), name
    assert set(built) == set(theirs.attacks_to_run)


def test_by_default_the_threat_is_autoattacks():
    """On CIFAR-10, as RobustBench has it."""
    parameters = inspect.signature(msfx.evaluate).parameters
    names = ("eps", "norm", "steps", "queries", "seed")
    assert AttackSettings(**{name: parameters[name].default for name in names}) == AttackSettings(eps=8 / 255)


def test_lists_of_attacks_name_each_once():
    assert expand(["standard", "square", "rand"]) == [*VERSIONS["standard"], *VERSIONS["rand"]]


def test_pgd_starts_anywhere_in_its_ball():
    for norm, mean in (("Linf", 0.05), ("L2", 0.1)):
        start = descent.PGD(nn.Identity(), AttackSettings(0.1, norm))._start(torch.zeros(4, 3, 32, 32)).flatten(1)
        radius = start.abs() if norm == "Linf" else start.norm(dim=1)
        assert 0.0999 < radius.max() < 0.10001
        assert radius.mean() == pytest.approx(mean, rel=0.02)
        assert start.mean() == pytest.approx(0, abs=0.002)


def test_runs_put_the_operators_own_gradient_first_queries_and_starts_last():
    names = [run.name for run in plan_runs(["square", "apgd-ce", "pgd"], ["identity", "exact"], 5)]
    assert names == ["apgd-ce/exact", "pgd/exact", "apgd-ce/identity", "pgd/identity", "square"]
    assert len({run.seed for run in plan_runs(["square", "apgd-ce"], ["exact", "identity"], 0)}) == 3
    own = ["apgd-start/identity", "pgd/smooth-3", "square", "apgd-ce/exact", "apgd-ce"]
    assert [run.name for run in plan_runs(own, ["identity"], 0)] == [
        "apgd-ce/exact", "apgd-ce/identity", "pgd/smooth-3", "square", "apgd-start/identity",
    ]  # fmt: skip
    assert [run.name for run in plan_runs(["pgd/smooth-0.5"], ["exact"], 0)] == ["pgd/smooth-0.5"]
    for name, message in [("square/exact", "uses no gradient"), ("pgd/steep", "unknown backward 'steep'"),
                          ("pgd/smooth-0", "unknown backward"), ("pgd/smooth-x", "unknown backward 'smooth-x'"),
                          ("pdg/exact", "unknown attack")]:  # fmt: skip
        with pytest.raises(EvaluationError, match=message):
            plan_runs([name], ["exact"], 0)


# Surrogates.


def test_an_attack_goes_through_its_surrogates_modes_in_order(sparse, images):
    """Seen from the operators: which mode each gradient of one attack was taken with."""
    operator = next(iter(msfx.operators(sparse.requires_grad_(False)).values()))
    seen = []
    hook = operator.register_forward_pre_hook(
        lambda m, args: seen.append((m.backward, m.backward_steepness)) if args[0].requires_grad else None
    )
    labels = sparse(images).argmax(1)
    seen.clear()
    settings = AttackSettings(eps=0.1, steps=9)
    attack("apgd-ce", sparse, images, labels, settings, "annealed")
    assert seen == [("smooth", s) for s in (3.0, 5.0, 9.0, 17.0, 30.0) for _ in range(2)]
    seen.clear()
    attack("apgd-ce-eot20", sparse, images, labels, settings, "annealed")
    assert seen == [("smooth", s) for s in (3.0, 5.0, 9.0, 17.0, 30.0) for _ in range(40)]
    seen.clear()
    attack("apgd-nearest", sparse, images, labels, replace(settings, eps=1e-4), "annealed")  # 45 steps and the start
    descent = [
        ("smooth", s) for s, n in zip((3.0, 5.0, 9.0, 17.0, 30.0), (10, 9, 9, 9, 9), strict=True) for _ in range(n)
    ]
    assert seen == 9 * descent
    seen.clear()
    attack("pgd", sparse, images, labels, settings, "smooth-3")
    assert set(seen) == {("smooth", 3.0)}
    seen.clear()
    attack("adaptive-1-1", sparse, images, labels, AttackSettings(eps=0.1, steps=1), "identity")
    assert {mode for mode, _ in seen} == {"identity"}
    hook.remove()
    with pytest.raises(EvaluationError, match="takes one backward mode"):
        attack("adaptive-1-1", sparse, images, labels, settings, "annealed")


def test_a_start_is_where_the_attack_begins():
    """The start is adversarial already, and comes back: one step from elsewhere would end elsewhere."""
    model = Linear().eval()
    x = 0.5 + 0.1 * (torch.rand(20, 3, 3, 3, generator=torch.Generator().manual_seed(1)) - 0.5)
    with torch.no_grad():
        labels = model(x).argmax(1)
        towards = torch.where(labels.bool(), 1.0, -1.0).view(-1, 1, 1, 1) * model.weight.sign().view(1, 3, 3, 3)
    starts = x + 0.3 * towards
    assert not model(starts).argmax(1).eq(labels).any(), "adversarial already"
    found = attack("apgd-start", model, x, labels, AttackSettings(eps=0.3, steps=1), "exact", starts)
    torch.testing.assert_close(found, starts)


def test_margin_does_not_depend_on_the_scale_of_logits(images):
    """Logits times 3,000: cross-entropy's gradient underflows, the margin's does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(243, 5)).eval()
    labels = model(images).argmax(1)
    scaled = nn.Sequential(model, Scale())
    settings = AttackSettings(eps=0.2, steps=20)
    plain, ours, blind = (
        model(attack(name, m, images, labels, settings)).argmax(1).eq(labels)
        for name, m in (("apgd-margin", model), ("apgd-margin", scaled), ("apgd-ce", scaled))
    )
    assert torch.equal(plain, ours)
    assert not ours.any()
    assert blind.any()


class Scale(nn.Module):
    def forward(self, x):
        return 3e4 * x


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "apgd-ce": {"loss": "ce", "n_restarts": 1, "eot_iter": 1, "n_iter": 7},
        "apgd-dlr": {"loss": "dlr", "n_restarts": 1, "eot_iter": 1, "n_iter": 7},
        "apgd-ce-r5": {"loss": "ce", "n_restarts": 5, "eot_iter": 1},
        "apgd-dlr-r5": {"loss": "dlr", "n_restarts": 5, "eot_iter": 1},
        "apgd-ce-eot20": {"loss": "ce", "n_restarts": 1, "eot_iter": 20},
        "apgd-dlr-eot20": {"loss": "dlr", "n_restarts": 1, "eot_iter": 20},
        "apgd-t": {"n_iter": 7, "n_target_classes": 3},
        "fab": {"targeted": False, "n_restarts": 5, "n_iter": 7},
        "fab-t": {"targeted": True, "n_restarts": 1, "n_target_classes": 3},
        "square": {"n_queries": 11, "p_init": 0.8},
        "adaptive-1-1": {"_power": 1},
        "adaptive-2-2": {"_power": 2},
    }.items(),
)
def test_each_attack_of_the_table_is_what_its_name_says(sparse, name, expected):
    settings = AttackSettings(eps=0.1, steps=7, queries=11, target_classes=3, seed=5)
    built = attack_kind(name).build(sparse, settings)
    found = {key: getattr(built, key) for key in expected}
    assert found == expected
    if name[:8] != "adaptive":
        assert (built.eps, built.seed, built.norm) == (0.1, 5, "Linf")
