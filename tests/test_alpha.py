"""The choice of alpha: the rule on outcomes made by hand, the search on a network of which attacks are quick."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from typer.testing import CliRunner

import meansparse_fx as msfx
from meansparse_fx import progress
from meansparse_fx.alpha import halving
from meansparse_fx.alpha.halving import Candidate, rung_sizes
from meansparse_fx.alpha.result import AlphaSearch, Move, Refinement, better, choose
from meansparse_fx.alpha.run import _proposals
from meansparse_fx.bundled import load_model, load_split
from meansparse_fx.cli import app
from meansparse_fx.errors import EvaluationError, StateError
from meansparse_fx.evaluate import ModelOutcome, batch, plan
from meansparse_fx.evaluate.outcome import PairedDifference
from meansparse_fx.sites import Site, SitePlan

QUICK: dict = {"steps": 5, "progress": False, "eps": 0.05}


@pytest.fixture
def sparse(net, images):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images], progress=False)
    msfx.set_alpha(sparse, 0.3)
    return sparse


@pytest.fixture
def held_out(net):
    """Images with the model's own predictions as labels: clean accuracy of the base is 1."""
    images = torch.rand(24, 3, 9, 9, generator=torch.Generator().manual_seed(7))
    return images, net(images).argmax(1)


def rig(monkeypatch, breaks):
    """Let an attack break what ``breaks(model, images)`` says: marked by a negative pixel, which no image has."""

    def rigged(name, model, images, labels, *_):
        hit = images.clone()
        hit[breaks(model, images)] = -1
        return hit

    monkeypatch.setattr(plan, "attack", rigged)
    judge(monkeypatch, lambda model, x, y: x.amin((1, 2, 3)) >= 0)


def judge(monkeypatch, correct):
    for module in (halving, batch):
        monkeypatch.setattr(module, "correct", correct)


def outcome(clean: int, robust: int, n: int = 1000, attacked: int = 1000) -> ModelOutcome:
    return ModelOutcome(torch.arange(n) < clean, {"a": torch.arange(attacked) < robust})


def best(rows: dict, budget: float = 0.003, significance: float = 0.05):
    return choose({(alpha, "mean"): found for alpha, found in rows.items()}, budget, significance)[0]


def test_choice_keeps_to_the_budget_and_takes_the_smaller_of_equals():
    rows = {0.0: outcome(900, 700), 0.1: outcome(899, 720), 0.2: outcome(898, 720), 0.3: outcome(896, 800)}
    assert best(rows) == 0.1
    assert best(rows, budget=0.004) == 0.3
    assert best({0.0: outcome(900, 700), 0.1: outcome(900, 650)}) == 0.0


def test_noise_is_not_chosen():
    """Three images gained and none lost are chance at 5 %, seven in a hundred; four are four."""
    assert best({0.0: outcome(900, 700), 0.1: outcome(900, 703)}) == 0.0
    assert best({0.0: outcome(900, 700), 0.1: outcome(900, 704)}) == 0.1
    assert best({0.0: outcome(900, 700), 0.1: outcome(900, 703)}, significance=0.1) == 0.1
    # Each beats the base, neither the other: the smaller one stays.
    assert best({0.0: outcome(900, 700), 0.1: outcome(900, 706), 0.2: outcome(900, 708)}) == 0.1
    # The smaller one does not beat the base, the larger one does.
    assert best({0.0: outcome(900, 700), 0.1: outcome(900, 703), 0.2: outcome(900, 709)}) == 0.2


def test_only_those_that_met_all_images_are_chosen():
    rows = {0.0: outcome(900, 700), 0.1: outcome(900, 250, attacked=250), 0.2: outcome(900, 710)}
    assert best(rows) == 0.2


def test_search_measures_all_and_chooses_by_the_rule(sparse, held_out):
    search = msfx.select_alpha(sparse, held_out, alphas=(0.2, 3.0), rungs=1, **QUICK)
    assert list(search.outcomes) == [0.0, 0.2, 3.0]
    assert {len(o.worst) for o in search.outcomes.values()} == {24}
    assert search.alpha == choose({(a, "mean"): o for a, o in search.outcomes.items()}, 0.003, 0.05)[0]
    assert float(search.outcomes[3.0].clean.double().mean()) < 1 - 0.003, "such a band flattens the features"
    assert "chosen" in str(search)
    assert json.loads(json.dumps(search.to_dict()))["rows"][0]["change"]["estimate"] == 0
    assert msfx.get_alpha(sparse) == pytest.approx(0.3), "put back"


def test_an_easy_gain_is_found(sparse, held_out, monkeypatch):
    """The search itself, with an attack that breaks the base on every other image and alpha 0.2 on none."""

    def breaks(model, images):
        strong = msfx.get_alpha(model) == pytest.approx(0.2)
        return (images.sum((1, 2, 3)) * 1000).long() % 2 < (0 if strong else 1)

    rig(monkeypatch, breaks)
    search = msfx.select_alpha(sparse, held_out, alphas=(0.1, 0.2, 0.25), clean_budget=1.0, **QUICK)
    assert search.alpha == 0.2
    search.apply(sparse)
    assert msfx.get_alpha(sparse) == pytest.approx(0.2)


def test_each_rung_leaves_the_better_half_and_the_bar_counts_its_attacks(sparse, held_out, monkeypatch):
    """The larger alpha, the fewer images are broken."""
    bar = Mock()
    monkeypatch.setattr("meansparse_fx.alpha.run.bar", lambda *_: nullcontext(bar))
    rig(monkeypatch, lambda model, images: torch.arange(len(images)) >= 10 * msfx.get_alpha(model))
    options = {"alphas": (0.1, 0.15, 0.2, 0.3, 0.4, 0.5), "clean_budget": 1.0, "rungs": 3, "batch_size": 5}
    search = msfx.select_alpha(sparse, held_out, **options | QUICK)
    attacked = {alpha: len(found.worst) for alpha, found in search.outcomes.items()}
    assert attacked == {0.0: 24, 0.1: 6, 0.15: 6, 0.2: 6, 0.3: 12, 0.4: 24, 0.5: 24}
    assert bar.add_task.call_args.kwargs["total"] == bar.advance.call_count


def test_bars_are_shown_by_default_and_end_at_their_ends(sparse, held_out, monkeypatch):
    displays = []
    monkeypatch.setattr(
        "meansparse_fx.alpha.run.bar", lambda enabled: displays.append(progress.bar(enabled)) or displays[-1]
    )
    options = {"alphas": (0.2,), "attacks": ("pgd/exact",), "steps": 1, "rungs": 1, "per_site": True}
    for own in ({}, {"progress": False}):
        msfx.select_alpha(sparse, held_out, **options, **own)
    assert [display.disable for display in displays] == [False, True]
    # The base and one alpha, each in one batch; then each of four sites at the other of the two.
    assert [(task.completed, task.total) for display in displays for task in display.tasks] == [(2, 2), (4, 4)] * 2


def test_clean_is_measured_on_all_images_and_robust_on_those_attacked(sparse, held_out):
    options = {"alphas": (0.2,), "batch_size": 5, "rungs": 1, **QUICK}
    search = msfx.select_alpha(sparse, held_out, attacked=7, **options)
    whole = msfx.select_alpha(sparse, held_out, **options)
    for alpha, found in search.outcomes.items():
        assert torch.equal(found.clean, whole.outcomes[alpha].clean)
        assert {len(m) for m in found.robust.values()} == {7} == {len(found.worst)}
        # The first batch of five is the same in both; the cut one starts elsewhere.
        assert all(torch.equal(m[:5], whole.outcomes[alpha].robust[n][:5]) for n, m in found.robust.items())


def test_the_hopeless_are_given_up(sparse, held_out, monkeypatch):
    made = []
    original = plan.attack

    def counted(name, model, images, *args):
        alphas = msfx.get_alpha(model)
        made.append((alphas, len(images)))
        return original(name, model, images, *args)

    monkeypatch.setattr(plan, "attack", counted)
    alphas = (0.02, 0.04, 0.06, 0.08, 3.0)
    search = msfx.select_alpha(sparse, held_out, alphas=alphas, clean_budget=0.3, batch_size=4, full_rows=True, **QUICK)
    attacked = {alpha: len(o.worst) for alpha, o in search.outcomes.items()}
    assert attacked[0.0] == 24
    assert attacked[3.0] == 6, "over the clean budget: it shows what became of it, and no more"
    assert sorted(attacked.values()) == [6, 6, 6, 12, 24, 24]
    assert "of fewer images, so that only the change against base compares" in search.to_latex()
    # Each kind of attack meets the images that are right to begin with, once.
    for alpha, found in search.outcomes.items():
        met = sum(n for a, n in made if a == pytest.approx(alpha))
        assert met == 4 * int(found.clean[: attacked[alpha]].sum())
    kept = [a for a in alphas if attacked[a] >= 12]
    worst = {a: int(o.worst[:6].sum()) for a, o in search.outcomes.items()}
    assert min(worst[a] for a in kept) >= max(worst[a] for a in alphas[:4] if a not in kept)


def test_images_double():
    assert rung_sizes(400, 3, 12) == {100: 12, 200: 7, 400: 4}
    assert rung_sizes(1, 3, 5) == {1: 5}
    assert rung_sizes(7, 1, 5) == {7: 5}
    assert rung_sizes(4, 3, 2) == {1: 2, 2: 2, 4: 2}


def test_interrupted_it_ends_the_same(sparse, held_out, tmp_path, monkeypatch):
    options = {"alphas": (0.2, 0.4, 0.6), "batch_size": 6, "per_site": True, "significance": 0.9, **QUICK}
    whole = msfx.select_alpha(sparse, held_out, **options).to_dict()
    original, calls = plan.attack, []

    def dying(*args):
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(plan, "attack", dying)
    with pytest.raises(KeyboardInterrupt):
        msfx.select_alpha(sparse, held_out, checkpoint=tmp_path / "c", **options)
    assert msfx.get_alpha(sparse) == pytest.approx(0.3)
    assert msfx.select_alpha(sparse, held_out, checkpoint=tmp_path / "c", **options).to_dict() == whole
    done = len(calls)
    assert msfx.select_alpha(sparse, held_out, checkpoint=tmp_path / "c", **options).to_dict() == whole
    assert len(calls) == done
    with pytest.raises(EvaluationError, match="attack settings differ"):
        msfx.select_alpha(sparse, held_out, checkpoint=tmp_path / "c", **options | {"eps": 0.1})
    with pytest.raises(EvaluationError, match="a checkpoint of more images, 1 batches of it did not come again"):
        msfx.select_alpha(sparse, [part[:18] for part in held_out], checkpoint=tmp_path / "c", **options)
    # The model's own alpha is no part of it; more candidates may join.
    msfx.set_alpha(sparse, 0.1)
    more = msfx.select_alpha(sparse, held_out, checkpoint=tmp_path / "c", **options | {"alphas": (0.2, 0.3, 0.4, 0.6)})
    assert set(more.outcomes) == {0.0, 0.2, 0.3, 0.4, 0.6}


def test_variants_share_one_search(sparse, held_out):
    msfx.set_variant(sparse, "smooth", steepness=4.0)
    options = {"alphas": (0.2, 0.3), "clean_budget": 1.0, "significance": 0.99, "rungs": 1, **QUICK}
    search = msfx.select_alpha(sparse, held_out, variants=("mean", "edge"), **options)
    assert {m.variant for m in msfx.operators(sparse).values()} == {"smooth"}, "put back"
    rows = [(variant, alpha) for variant, alpha, _ in search.rows()]
    assert sorted(rows) == sorted({(search.variant, 0.0), *((v, a) for v in ("mean", "edge") for a in (0.2, 0.3))})
    for variant in ("mean", "edge"):
        alone = msfx.select_alpha(sparse, held_out, variants=(variant,), **options)
        together = search.outcomes if search.variant == variant else search.others[variant]
        for alpha, found in alone.outcomes.items():
            assert torch.equal(found.clean, together[alpha].clean)
            assert torch.equal(found.worst, together[alpha].worst)
    assert "edge 0.2" in str(search)
    search.apply(sparse)
    assert {m.variant for m in msfx.operators(sparse).values()} == {search.variant}
    assert {m.steepness for m in msfx.operators(sparse).values()} == {4.0}


@pytest.mark.filterwarnings("ignore:.*equal another of them")
def test_site_by_site_takes_what_is_better_and_keeps_to_the_budget(sparse, held_out, monkeypatch):
    """With an attack that breaks an image for each site that is not at 0.4, but for the first, best at 0."""
    wanted = dict.fromkeys(msfx.operators(sparse), 0.4) | {"relu": 0.0}

    def breaks(model, images):
        alphas = {n: float(m.alpha) for n, m in msfx.operators(model).items()}
        wrong = sum(not math.isclose(alphas[n], wanted[n], abs_tol=1e-6) for n in wanted)
        return (images.sum((1, 2, 3)) * 1000).long() % 6 < wrong

    rig(monkeypatch, breaks)
    images, labels = (part.repeat(20, *[1] * (part.dim() - 1)) for part in held_out)
    options = {"alphas": (0.2, 0.4, 0.6), **QUICK}
    levels = []
    monkeypatch.setattr("meansparse_fx.alpha.run.better", lambda *given: levels.append(given[-1]) or better(*given))
    search = msfx.select_alpha(sparse, (images, labels), per_site=True, **options)
    assert set(levels) == {0.05 / 12}, "divided by the moves"
    assert search.uniform == 0.4
    assert search.alpha == pytest.approx(wanted)
    assert [move.group for move in search.refinement.moves if move.taken] == ["relu"]
    assert len(search.refinement.moves) == 3 * 4  # 0, one step down, one step up
    refused = [move for move in search.refinement.moves if not move.taken]
    assert {move.attacked for move in refused} == {120}, "given up on the first quarter"
    assert "by site" in str(search)
    assert "relu to 0" in str(search)
    search.apply(sparse)
    assert msfx.get_alpha(sparse) == pytest.approx(wanted)
    grouped = msfx.select_alpha(sparse, (images, labels), per_site=lambda site: site.split("_")[0], **options)
    assert {move.group for move in grouped.refinement.moves} == {"relu", "slope", "gelu"}
    named = msfx.select_alpha(sparse, (images, labels), per_site=True, site_alphas=(0.0, 0.4, 0.9), **options)
    assert {move.alpha for move in named.refinement.moves} == {0.0, 0.9}, "the start itself is no move"
    assert named.alpha == pytest.approx(wanted)
    judge(monkeypatch, lambda model, x, y: _spoiled(model, x))
    tight = msfx.select_alpha(sparse, (images, labels), per_site=True, **options)
    assert tight.alpha == 0.4, "the move to 0 at relu costs more clean accuracy than allowed"
    (over,) = [m for m in tight.refinement.moves if (m.group, m.alpha) == ("relu", 0.0)]
    assert (over.change, over.attacked) == (None, 0)


def _spoiled(model, x):
    """Right on all images, but on half of them where relu alone is at 0."""
    alphas = {n: float(m.alpha) for n, m in msfx.operators(model).items()}
    alone = alphas["relu"] == 0 and alphas["gelu"] > 0
    right = x.amin((1, 2, 3)) >= 0
    return right & (torch.arange(len(x)) % 2 == 0) if alone else right


def test_proposals_are_the_neighbours_nothing_and_the_leader():
    grid = [0.0, 0.1, 0.2, 0.3]
    assert _proposals(grid, 0.2, 0.2) == [0.0, 0.1, 0.3]
    assert _proposals(grid, 0.0, 0.3) == [0.1, 0.3]
    assert _proposals(grid, 0.3, 0.3) == [0.0, 0.2]


def by_stage(*sizes):
    """Return how many sites each stage has, of (name, resolution) in order."""
    sites = (Site(name, "activation", None, 1, 8, (2, 8, size, size), "conv", name, name) for name, size in sizes)
    return dict(Counter(SitePlan(tuple(sites), "by hand").stages().values()))


def test_a_file_gives_back_every_part(tmp_path):
    rows = {0.0: outcome(900, 700), 0.2: outcome(899, 720)}
    change = PairedDifference.of(rows[0.0].worst, rows[0.2].worst)
    moves = (Move("a", 0.1, 0.5, 0, None, False), Move("b", 0.1, 0.9, 1000, change, True))
    search = AlphaSearch({"a": 0.2, "b": 0.1}, rows, 0.003, refinement=Refinement(0.2, rows[0.2], moves))
    search.save(tmp_path / "s.json")
    back = AlphaSearch.load(tmp_path / "s.json")
    assert (back.refinement.moves, back.threat, back.to_dict()) == (moves, None, search.to_dict())


def test_stages_are_found():
    blocks = [(f"layer{i}.{j}.relu{k}", s) for i in (1, 2) for j in (0, 1) for k in "_1" for s in (32 // i,)]
    blocks[4] = ("layer2.0.relu_", 32)  # before the convolution with a stride
    assert by_stage(("relu", 64), *blocks) == {"relu": 1, "layer1": 4, "layer2": 4}
    assert by_stage(*((f"model.{name}", size) for name, size in blocks)) == {"model.layer1": 4, "model.layer2": 4}
    vgg = [(f"features.{i}", size) for i, size in ((1, 64), (4, 32), (6, 32), (9, 16), (11, 16), (14, 8))]
    assert by_stage(*vgg) == {"features.1": 1, "features.4": 2, "features.9": 2, "features.14": 1}
    mobile = [(f"blocks.{i}.0.act", size) for i, size in enumerate((64, 32, 16, 16, 8))]
    assert by_stage(*mobile, ("act", 8)) == {"blocks.0": 1, "blocks.1": 1, "blocks.2": 2, "blocks.4": 2}
    assert by_stage(*((f"blocks.{i}.mlp.act", 14) for i in range(12))) == {"blocks": 12}
    twice = [(f"a.{i}.{k}", size) for i, size in enumerate((16, 8, 16)) for k in ("act1", "act2")]
    assert by_stage(*twice) == {"a.0": 2, "a.1": 2, "a.2": 2}
    assert by_stage() == {}
    assert by_stage(("a.act", 64), ("b.act", 32)) == {"a": 1, "b": 1}
    assert by_stage(("stem.act", 8), ("blocks.0.act", 8), ("blocks.1.act", 8)) == {"stem.act": 3}


def test_alpha_by_stage(sparse, held_out):
    options = {"alphas": (0.2,), "attacks": ("pgd/exact",), **QUICK}
    search = msfx.select_alpha(sparse, held_out, per_site="stage", **options)
    assert {move.group for move in search.refinement.moves} == {"relu"}
    with pytest.raises(EvaluationError, match="not 'block'"):
        msfx.select_alpha(sparse, held_out, per_site="block", **options)
    for variants, words in ((("mean", "wide"), "'wide'"), ((), "None")):
        with pytest.raises(EvaluationError, match=f"variants must be of .* got {words}"):
            msfx.select_alpha(sparse, held_out, variants=variants, **QUICK)


def test_each_candidate_is_tried_with_its_variant(sparse, held_out, monkeypatch):
    """With an attack that breaks every image of a model with the variant mean, the base among them."""
    variant = msfx.operators(sparse)["relu"]
    rig(monkeypatch, lambda model, images: torch.full((len(images),), variant.variant == "mean"))
    options = {"alphas": (0.2,), "variants": ("mean", "edge"), "clean_budget": 1.0, **QUICK}
    search = msfx.select_alpha(sparse, held_out, **options)
    assert (search.variant, search.alpha) == ("edge", 0.2)
    assert int(search.outcomes[0.2].worst.sum()) == 24


def test_the_leader_is_within_the_budget():
    rows = {0.0: outcome(900, 700), 0.1: outcome(899, 710), 0.2: outcome(850, 800)}
    assert AlphaSearch(0.0, rows, 0.003).leader == 0.1
    assert AlphaSearch(0.0, rows, 0.1).leader == 0.2
    rows[0.3] = outcome(900, 250, attacked=250)
    assert AlphaSearch(0.0, rows, 0.003).leader == 0.1, "0.3 was given up early"
    assert AlphaSearch(0.0, {0.0: rows[0.0], 0.3: rows[0.3]}, 0.003).leader == 0.0


@pytest.mark.parametrize(
    "option", [{"significance": 0.0}, {"significance": 1.0}, {"clean_budget": -0.1}, {"clean_budget": 1.1}]
)
def test_budget_and_significance_are_shares(sparse, held_out, option):
    with pytest.raises(
        EvaluationError, match=f"got {option.get('clean_budget', 0.003)} and {option.get('significance', 0.05):g}"
    ):
        msfx.select_alpha(sparse, held_out, **option, **QUICK)


def test_no_clean_accuracy_may_be_lost(sparse, held_out, monkeypatch):
    """A budget of 0; the attack breaks what is not changed, so that only clean accuracy speaks against it."""
    rig(monkeypatch, lambda model, images: torch.full((len(images),), not float(msfx.operators(model)["relu"].alpha)))
    assert msfx.select_alpha(sparse, held_out, alphas=(1e-6,), clean_budget=0.0, **QUICK).alpha == 1e-6


def test_candidates_by_site_are_told_apart():
    names = {str(Candidate(a)) for a in (0.1, 0.2, {"a": 0.1, "b": 0.2}, {"a": 0.2, "b": 0.1})}
    assert len(names) == 4
    assert str(Candidate({"a": 0.1, "b": 0.2})) == str(Candidate({"b": 0.2, "a": 0.1}))


def test_switches_are_put_back_whatever_happens(sparse, held_out, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(plan, "attack", broken)
    msfx.set_backward(sparse, "smooth")
    with pytest.raises(RuntimeError, match="out of memory"):
        msfx.select_alpha(sparse, held_out, variants=("edge",), alphas=(0.1,), **QUICK)
    assert {(m.variant, m.backward) for m in msfx.operators(sparse).values()} == {("mean", "smooth")}
    assert msfx.get_alpha(sparse) == pytest.approx(0.3)


def test_a_search_without_an_attack_of_its_own_is_refused(sparse, held_out):
    with pytest.raises(EvaluationError, match="no other model's images to start at: add an attack"):
        msfx.select_alpha(sparse, held_out, **QUICK | {"attacks": ("apgd-start/annealed",)})


def test_an_uncalibrated_model_is_refused_before_it_is_attacked(net, images, held_out, monkeypatch):
    monkeypatch.setattr(plan, "attack", None)
    with pytest.raises(StateError, match=r"no statistics: calibrate the model, .* before select_alpha"):
        msfx.select_alpha(msfx.transform(net, images), held_out, **QUICK)


def test_labels_that_the_base_does_not_know_are_remarked_on(sparse, held_out):
    images, labels = held_out
    with pytest.warns(UserWarning, match="select_alpha: 0 of 24 images right; .*: no trained weights, shifted labels"):
        msfx.select_alpha(sparse, (images, (labels + 1) % (labels.max() + 1)), alphas=(0.1,), **QUICK)


def test_the_commands_pass_a_choice_on(tmp_path):
    """select --out writes what evaluate --alpha reads, variant and alphas by site included."""
    data = ("--data", "meansparse_fx/bundled/fashion_mnist_subset.npz")
    statistics, choice, out = (tmp_path / name for name in ("s", "choice.json", "out"))
    run("calibrate", "bundled", *data, "--split", "calibration", "--limit", 100, "--out", statistics)
    threat = ("--statistics", statistics, "--eps", "0.1", "--steps", 2, "--limit", 12, "--attacks", "pgd")
    done = run("select", "bundled", *data, "--split", "selection", *threat, "--alphas", "0.2,0.3", "--variants",
               "mean,edge", "--out", choice, "--checkpoint", tmp_path / "c1")  # fmt: skip
    assert "12 held-out images" in done.stdout
    found = json.loads(choice.read_text())
    assert found["alpha"] in (0, 0.2, 0.3)
    assert {row["variant"] for row in found["rows"]} == {"mean", "edge"}
    by_site = dict.fromkeys(msfx.operators(msfx.transform(load_model(), load_split("test")[0][:2])), 0.2) | {
        "stem.2": 0.3
    }
    choice.write_text(json.dumps(found | {"variant": "edge", "alpha": by_site}))
    command = ("evaluate", "bundled", *data, "--split", "test", *threat, "--alpha", choice, "--out", out)
    done = run(*command, "--checkpoint", tmp_path / "c2")
    report = json.loads((out / "report.json").read_text())
    assert report["alpha"] == by_site
    assert report["cumulative"]
    assert "clean loss" not in report["headline"], "no budget was named"
    assert (tmp_path / "c1").exists()
    assert (tmp_path / "c2").exists()
    choice.write_text("{}")
    failed = CliRunner().invoke(app, [str(a) for a in command])
    assert failed.exit_code == 2
    assert "not a file that select --out wrote" in failed.stderr
    choice.write_text(json.dumps(found | {"alpha": 0.0, "leader": 0.2}))
    failed = CliRunner().invoke(app, [str(a) for a in command])
    assert failed.exit_code == 0
    assert "To compare what looked best: --alpha 0.2" in " ".join(failed.stdout.split())
    assert len(found["marks"]) == 12
    assert found["threat"]["eps"] == 0.1


def run(*command):
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, done.output
    return done


def test_a_resumed_search_says_where_it_goes_on(sparse, held_out, tmp_path, monkeypatch, capsys):
    made, own = [], plan.attack
    options = QUICK | {"alphas": (0.1, 0.2), "checkpoint": tmp_path / "c", "progress": True, "attacks": "pgd/exact"}

    def attack_or_die(*given):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return own(*given)

    monkeypatch.setattr(plan, "attack", attack_or_die)
    with pytest.raises(KeyboardInterrupt):
        msfx.select_alpha(sparse, held_out, **options)
    monkeypatch.setattr(plan, "attack", own)
    assert "goes on" not in capsys.readouterr().out
    msfx.select_alpha(sparse, held_out, **options)
    assert "goes on from attack 3 of 7\n" in capsys.readouterr().out


def test_shares_of_fewer_images_are_marked(monkeypatch):
    names = ("apgd-ce/exact", "apgd-ce/identity")
    outcomes = {
        alpha: ModelOutcome(torch.ones(200).bool(), {name: torch.arange(n) < n * 0.9 for name in names})
        for alpha, n in ((0.0, 200), (0.1, 50), (0.2, 200))
    }
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(msfx.AlphaSearch(0.0, outcomes, 0.003))
        assert "in parentheses: given up early, of fewer" in " ".join(text.split())
        rows = {line.split()[0]: line for line in text.splitlines() if "\N{BOX DRAWINGS LIGHT VERTICAL}" in line}
        assert "(90.0)" in rows["0.1"]
        assert "(" not in rows["0"] + rows["0.2"]
        assert max(map(len, text.splitlines())) <= width
