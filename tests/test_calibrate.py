"""Calibration: exact over any split, indifferent to alpha, and plain about bad data."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import meansparse_fx as msfx
from meansparse_fx import progress
from meansparse_fx.calibrate import run
from meansparse_fx.calibrate.checkpoint import PassState
from meansparse_fx.calibrate.convergence import Groups, Precision, precision
from meansparse_fx.calibrate.source import Source
from meansparse_fx.calibrate.totals import Totals, merge_all
from meansparse_fx.data import ImageSet
from meansparse_fx.errors import ArtifactError, CalibrationError, StateError, StatisticsError, WriteError
from meansparse_fx.observer import ChannelMoments
from meansparse_fx.passes import observe
from meansparse_fx.shards import file_of_rank
from meansparse_fx.statistics import ChannelHistogram, ChannelStatistics


def test_statistics_are_those_of_the_base_models_own_values(net, images, sites):
    """Recomputed in NumPy from a hook on the untouched model."""
    seen = []
    net.bn.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone().double().numpy()))
    net(images)
    values = seen[0].transpose(1, 0, 2, 3).reshape(8, -1)
    stats = msfx.calibrate(msfx.transform(net, images), images.split(5), progress=False)
    assert list(stats) == list(sites)
    assert stats.images == 12
    assert stats["relu"].count == values.shape[1]
    # The captured convolution sees batches of 5, the hook one of 12: float32 convolutions differ in the last bits.
    np.testing.assert_allclose(stats["relu"].mean.numpy(), values.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["relu"].std.numpy(), values.std(1), rtol=1e-5)


def test_alpha_plays_no_part_and_is_kept(net, images, sites):
    sparse = msfx.transform(net, images)
    first = msfx.calibrate(sparse, images.split(5), progress=False)
    msfx.set_alpha(sparse, 0.8)
    before = sparse(images)
    second = msfx.calibrate(sparse, images.split(5), progress=False)
    assert all(torch.equal(first[n].mean, second[n].mean) for n in sites)
    assert msfx.get_alpha(sparse) == pytest.approx(0.8)
    assert torch.equal(sparse(images), before)


def test_a_second_calibration_replaces_the_first(net, images, sites):
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, [images * 0], progress=False)
    again = msfx.calibrate(sparse, [images], progress=False)
    fresh = msfx.calibrate(msfx.transform(net, images), [images], progress=False)
    assert all(torch.equal(again[n].m2, fresh[n].m2) for n in sites)


def test_loaders_of_images_with_labels(net, images, labels):
    data = torch.utils.data.TensorDataset(images, labels)
    stats = msfx.calibrate(msfx.transform(net, images), torch.utils.data.DataLoader(data, batch_size=5), progress=False)
    assert stats.images == 12


def test_bad_data_is_refused(net, images):
    sparse = msfx.transform(net, images)
    with pytest.raises(CalibrationError, match="no images"):
        msfx.calibrate(sparse, [], progress=False)
    bad = images.clone()
    bad[7, 0, 3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"relu: NaN or inf .* batch 1"):
        msfx.calibrate(sparse, bad.split(5), progress=False)
    with pytest.raises(CalibrationError, match="yielded str"):
        msfx.calibrate(sparse, ["x"], progress=False)
    with pytest.raises(StateError, match="train mode"):
        msfx.calibrate(sparse.train(), [images], progress=False)
    sparse.eval().bn.train()  # would use the batch's statistics, and change its own
    with pytest.raises(StateError, match=r"train mode \(bn\): call model.eval\(\) before calibrate"):
        msfx.calibrate(sparse, [images], progress=False)


def test_a_dead_channel_is_left_alone(net, images):
    with torch.no_grad():
        net.mlp.weight[2] = 0
    sparse = msfx.transform(net, images)
    stats = msfx.calibrate(sparse, [images], progress=False)
    assert float(stats["gelu"].std[2]) == 0
    msfx.set_alpha(sparse, 0.5)
    assert float(msfx.operators(sparse)["gelu"].threshold[2]) == -1


def moments(stats) -> dict[str, tuple]:
    return {name: (s.count, s.mean.tolist(), s.m2.tolist()) for name, s in stats.items()}


@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_and_batch_sizes_do_not_matter(order, cuts, net, images):
    """In float64, so that the convolutions' own rounding does not depend on the batch size to any extent that shows."""
    net, images = copy.deepcopy(net).double(), images.double()
    sparse = msfx.transform(net, images)
    whole = msfx.calibrate(sparse, [images], progress=False)
    parts = [images[list(order)][a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 12])]
    split = msfx.calibrate(sparse, parts, progress=False)
    for name in whole:
        assert split[name].count == whole[name].count
        torch.testing.assert_close(split[name].mean, whole[name].mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(split[name].m2, whole[name].m2, rtol=1e-11, atol=0)


def test_fused_observers_measure_and_compute_the_same(net, images, sites, monkeypatch):
    """What a GPU runs: the observer makes the activation's call. Here its plain composition."""
    sparse = msfx.transform(net, images)
    plain, fused = observe(sparse), observe(sparse, fused=True)
    torch.testing.assert_close(fused[0](images), plain[0](images), rtol=1e-5, atol=1e-6)
    for name in sites:
        assert fused[1][name].activation is not None
        assert torch.equal(fused[1][name].latest.mean, plain[1][name].latest.mean)
        assert torch.equal(fused[1][name].latest.m2, plain[1][name].latest.m2)
    calls = [n for n in fused[0].graph.nodes if n.op.startswith("call") and "relu" in str(n.target)]
    assert all(str(n.target).startswith("meansparse.") for n in calls)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_moments_are_not_rounded(net, images, amp):
    kept = []
    net.bn.register_forward_hook(lambda m, i, o: kept.append(o.detach().clone()))
    with torch.autocast("cpu", amp):
        net(images)
    values = kept[0].double().transpose(0, 1).flatten(1)
    stats = msfx.calibrate(msfx.transform(net, images), [images], amp=amp, channels_last=True, progress=False)
    # Convolutions of another layout may round a value of 8 or 11 bits the other way, here and there.
    torch.testing.assert_close(stats["relu"].mean, values.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats["relu"].std, values.std(1, correction=0), rtol=1e-3, atol=0)


def test_the_record(net, images, sites):
    stats = msfx.calibrate(msfx.transform(net, images), [images * 0.5], progress=False, metadata={"data": "noise"})
    assert stats.metadata["input_range"] == f"{float(images.min()) / 2:g} to {float(images.max()) / 2:g}"
    assert stats.metadata["torch"] == torch.__version__
    assert stats.metadata["data"] == "noise"
    assert stats.metadata["image_shape"] == "3x9x9"
    assert stats.table["gelu"]["channel_dim"] == 3
    assert stats.table["gelu"]["activation"] == "gelu"
    assert len(stats.graph) == len(stats.fingerprint) == 32
    with pytest.raises(CalibrationError, match="metadata must be a mapping of facts by name, got 'noise'"):
        msfx.calibrate(msfx.transform(net, images), [images], progress=False, metadata="noise")


def test_equal_weights_before_another_activation_are_refused(net, images):
    stats = msfx.calibrate(msfx.transform(net, images), [images], progress=False)
    table = stats.table | {"gelu": stats.table["gelu"] | {"activation": "silu"}}
    with pytest.raises(StatisticsError, match="gelu: measured before silu"):
        msfx.set_statistics(msfx.transform(net, images), replace(stats, table=table))


# Checkpoints


class Interrupted(Exception):
    pass


class Failing:
    """Batches until a position, and then an exception, as a crash between two of them."""

    def __init__(self, batches, until: int) -> None:
        self.batches, self.until = batches, until

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for index, batch in enumerate(self.batches):
            if index == self.until:
                raise Interrupted
            yield batch


@pytest.mark.parametrize("options", [{}, {"histograms": True}, {"tolerance": 1e-6}], ids=str)
@pytest.mark.parametrize("kind", ["list", "iterable", "DataLoader"])
def test_resumed_equals_uninterrupted(net, images, tmp_path, options, kind):
    many = torch.cat([images, images.flip(3), images.flip(2)])
    batches = list(many.split(2))  # enough for a precision
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, Failing(batches, 99), progress=False, **options).save(tmp_path / "whole")
    keeping = {"checkpoint": tmp_path / "c", "every": 0, "progress": False} | options
    for until in (1, 7, 17):
        with pytest.raises(Interrupted):
            msfx.calibrate(sparse, Failing(batches, until), **keeping)
    loader = {
        "list": Failing(batches, 99),
        "iterable": Failing(batches, 99),
        "DataLoader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(many), batch_size=2),
    }[kind]
    if kind == "DataLoader":  # the interrupted ones did not know how many images they had
        (tmp_path / "c").unlink()
        stopping = torch.utils.data.DataLoader(Exploding(many, 31), batch_size=2)
        with pytest.raises(Interrupted):
            msfx.calibrate(sparse, stopping, **keeping)
    msfx.calibrate(sparse, loader, **keeping).save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    msfx.calibrate(sparse, loader, **keeping).save(tmp_path / "again")  # a finished checkpoint
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"c", "whole", "resumed", "again"}


class Exploding(torch.utils.data.Dataset):
    """Images, and an exception at one."""

    def __init__(self, images, at: int) -> None:
        self.images, self.at, self.read = images, at, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.read.append(index)
        if index == self.at:
            raise Interrupted
        return (self.images[index],)


def test_what_was_measured_is_not_read_again(net, images, tmp_path):
    sparse, data = msfx.transform(net, images), Exploding(images, 9)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    keeping = {"checkpoint": tmp_path / "c", "every": 0, "progress": False}
    with pytest.raises(Interrupted):
        msfx.calibrate(sparse, loader, **keeping)
    data.at, data.read = -1, []
    msfx.calibrate(sparse, loader, **keeping)
    assert data.read == [0, 1, 6, 7, 8, 9, 10, 11]  # the first and the last measured batch, to compare


def test_checkpoints_of_something_else_are_refused(net, images, tmp_path):
    sparse = msfx.transform(net, images)
    keeping = {"checkpoint": tmp_path / "c", "every": 0, "progress": False}
    with pytest.raises(Interrupted):
        msfx.calibrate(sparse, Failing(images.split(3), 2), **keeping)
    with pytest.raises(CalibrationError, match="number of batches"):
        msfx.calibrate(sparse, Failing(images.split(4), 99), **keeping)
    with pytest.raises(CalibrationError, match="another order of images: batch 0"):
        msfx.calibrate(sparse, Failing(images.flip(0).split(3), 99), **keeping)
    with pytest.raises(CalibrationError, match="another order of images: batch 1"):
        msfx.calibrate(sparse, Failing(images[[0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]].split(3), 99), **keeping)
    with pytest.raises(CalibrationError, match="precision or layout"):
        msfx.calibrate(sparse, Failing(images.split(3), 99), amp=torch.bfloat16, **keeping)
    with pytest.raises(CalibrationError, match="choice of histograms"):
        msfx.calibrate(sparse, Failing(images.split(3), 99), histograms=True, **keeping)
    with torch.no_grad():
        net.head.bias += 1
    with pytest.raises(CalibrationError, match="weights"):
        msfx.calibrate(msfx.transform(net, images), Failing(images.split(3), 99), **keeping)
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=3, shuffle=True)
    with pytest.raises(CalibrationError, match="shuffles"):
        msfx.calibrate(sparse, shuffled, **keeping)
    (tmp_path / "c").write_text("x")
    with pytest.raises(ArtifactError, match="truncated or not a checkpoint"):
        msfx.calibrate(sparse, images.split(3), **keeping)
    (tmp_path / "c").rename(tmp_path / "c.rank0-of-2.old")
    assert file_of_rank(tmp_path / "c", 1, 3) == tmp_path / "c.rank1-of-3", "a copy by another name is no checkpoint"
    (tmp_path / "[c].rank0-of-2").touch()
    with pytest.raises(ArtifactError, match="2 process"):
        file_of_rank(tmp_path / "[c]", 0, 1)
    (tmp_path / "c.rank0-of-2.old").rename(tmp_path / "c.rank0-of-2")
    with pytest.raises(ArtifactError, match=r"2 process.* now there are 1"):
        msfx.calibrate(sparse, images.split(3), **keeping)


def test_a_loader_that_has_become_shorter_is_refused(net, images, tmp_path):
    """One that does not say how long it is, so that only what it yields can tell."""

    def loader(count: int, at: int = 99):
        return (batch for batch in Failing(images.split(3)[:count], at))

    sparse = msfx.transform(net, images)
    keeping = {"checkpoint": tmp_path / "c", "every": 0, "progress": False}
    with pytest.raises(Interrupted):
        msfx.calibrate(sparse, loader(4, 3), **keeping)
    with pytest.raises(CalibrationError, match="a checkpoint after 3 batches, more than the loader has now: remove it"):
        msfx.calibrate(sparse, loader(2), **keeping)


def test_what_a_killed_process_left_is_removed(net, images, tmp_path):
    (tmp_path / ".c.1a2b.partial").touch()
    sparse = msfx.transform(net, images)
    msfx.calibrate(sparse, images.split(3), checkpoint=tmp_path / "c", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_without_a_folder_fails_before_the_pass(net, images, tmp_path):
    drawn = []
    batches = (drawn.append(batch) or batch for batch in images.split(3))
    with pytest.raises(WriteError, match="missing"):
        msfx.calibrate(msfx.transform(net, images), batches, checkpoint=tmp_path / "missing" / "c", progress=False)
    assert not drawn


def test_the_first_bad_batch_is_named():
    observer = ChannelMoments("site", 2, 1)
    tally = PassState([observer], torch.device("cpu"), grouped=False)
    for value in (torch.inf, 0.0, torch.nan):
        tally.add(observer(torch.tensor([[1.0, value], [2.0, 3.0]])))
    with pytest.raises(CalibrationError, match="site: NaN or inf in the site's input, first in batch 0"):
        tally.refuse_non_finite()


def test_totals_of_one_value_and_of_none():
    empty = Totals.empty([1, 1], torch.device("cpu"))
    total = empty.merge(Totals((1, 0), *torch.tensor([[5.0, 0], [0, 0]]).double(), empty.sizes))
    assert (total.counts, total.mean.tolist(), total.m2.tolist()) == ((1, 0), [5, 0], [0, 0])


def test_statistics_can_take_part_in_autograd(net, images, tmp_path):
    """What inference mode makes cannot; nor what is read from a checkpoint under it."""
    sparse, keeping = msfx.transform(net, images), {"checkpoint": tmp_path / "c", "every": 0, "progress": False}
    with pytest.raises(Interrupted):
        msfx.calibrate(sparse, Failing(images.split(4), 2), histograms=True, **keeping)
    resumed = msfx.calibrate(sparse, Failing(images.split(4), 99), histograms=True, **keeping)["relu"]
    site = msfx.calibrate(sparse, images.split(4), histograms=True, progress=False)["relu"]
    parts = [(s.mean, s.m2, s.histogram.low, s.histogram.width, s.histogram.counts) for s in (resumed, site)]
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    assert not any(tensor.is_inference() for tensors in parts for tensor in tensors)


def test_non_finite_values_keep_the_checkpoint_before_them(net, images, tmp_path):
    bad = images.clone()
    bad[7, 0, 3, 3] = float("inf")
    sparse = msfx.transform(net, images)
    keeping = {"checkpoint": tmp_path / "c", "every": 0, "progress": False}
    with pytest.raises(CalibrationError, match=r"relu: NaN or inf .* batch 2"):
        msfx.calibrate(sparse, Failing(bad.split(3), 99), **keeping)
    mended = msfx.calibrate(sparse, Failing(images.split(3), 99), **keeping)
    assert moments(mended) == moments(msfx.calibrate(sparse, images.split(3), progress=False))


def test_a_long_pass_ends_soon_after_nan(net, images, monkeypatch):
    """Not only at its end: it is looked for every few seconds."""
    monkeypatch.setattr(run, "LOOK_SECONDS", -1)
    bad, drawn = images.clone(), []
    bad[3] = torch.nan
    batches = (drawn.append(batch) or batch for batch in bad.split(3))
    with pytest.raises(CalibrationError, match=r"relu: NaN or inf .* batch 1"):
        msfx.calibrate(msfx.transform(net, images), batches, progress=False)
    assert len(drawn) == 2


@pytest.mark.parametrize("options", [{}, {"progress": False}], ids=str)
def test_the_bar_is_shown_unless_it_is_not_wanted_and_counts_every_image(net, images, tmp_path, monkeypatch, options):
    displays, keeping = [], {"checkpoint": tmp_path / "c", "every": 0}
    monkeypatch.setattr(run, "bar", lambda enabled: displays.append(progress.bar(enabled)) or displays[-1])
    sparse = msfx.transform(net, images)
    with pytest.raises(Interrupted):
        msfx.calibrate(sparse, Failing(images.split(5), 1), **keeping, **options)
    (tmp_path / "c").unlink()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=5)
    for _ in range(2):  # the second goes on from the end of the first
        msfx.calibrate(sparse, loader, **keeping, **options)
    assert [display.disable for display in displays] == [bool(options)] * 3
    assert [(task.completed, task.total) for display in displays for task in display.tasks] == [
        (5, None),
        (12, 12),
        (12, 12),
    ]


# Stopping by itself


def noise(images: int, channels: int = 5, seed: int = 0) -> torch.Tensor:
    """Values of one image share a random offset and scale: what makes pixels a poor count of samples."""
    g = torch.Generator().manual_seed(seed)
    offset = torch.randn(images, channels, 1, 1, generator=g)
    return offset + 0.5 * torch.randn(images, channels, 16, 16, generator=g)


def test_standard_errors_are_those_of_repeated_experiments():
    """Twenty-five data sets, measured by NumPy: how means and deviations really scatter, in units of the deviation."""
    net = torch.nn.Sequential(torch.nn.ReLU())
    values = [noise(320, seed=seed) for seed in range(25)]
    sparse = msfx.transform(net.eval(), values[0][:2], placement=msfx.Placement(channel_dims={"0": 1}))
    arrays = [v.double().numpy().transpose(1, 0, 2, 3).reshape(5, -1) for v in values]
    std = np.mean([a.std(1) for a in arrays])
    true_mean_error = np.std([a.mean(1) for a in arrays], axis=0).mean() / std
    true_std_error = np.std([a.std(1) for a in arrays], axis=0).mean() / std
    found = []
    for v in values[:5]:
        empty = Totals.empty([5], torch.device("cpu"))
        tally = Groups(empty)
        observed, observers = observe(sparse)
        for batch in v.split(8):
            observed(batch)
            tally.add(empty.of_batch(list(observers.values())))
        found.append(precision(tally.closed, ["0"]))
    # 40 groups and 25 experiments, five channels: each estimate is good to about a tenth.
    assert np.mean([p.mean_error for p in found]) == pytest.approx(true_mean_error, rel=0.25)
    assert np.mean([p.std_error for p in found]) == pytest.approx(true_std_error, rel=0.25)
    by_pixels = 1 / np.sqrt(320 * 256)
    assert found[0].mean_error > 5 * by_pixels


def test_stops_when_the_tolerance_is_reached(net):
    images = torch.rand(400, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    sparse = msfx.transform(net, images[:2])
    data = ImageSet(images, torch.zeros(400, dtype=torch.long), "noise")
    stats = msfx.calibrate(sparse, data.loader(4), tolerance=0.05, progress=False)
    assert 16 * 4 <= stats.images < 400
    assert len(stats.marks) == stats.images
    assert stats.metadata["tolerance"] == "0.05, reached"
    assert "channel" in stats.metadata["precision"]
    further = Failing(list(images.split(4)), stats.images // 4)
    assert msfx.calibrate(sparse, further, tolerance=0.05, progress=False).images == stats.images, (
        "nothing more is read"
    )
    whole = msfx.calibrate(sparse, images.split(4), progress=False)
    for name in whole:
        # Three standard errors: one of 30 channels may leave two.
        assert ((stats[name].mean - whole[name].mean).abs() <= 0.15 * whole[name].std).all()
        torch.testing.assert_close(stats[name].std, whole[name].std, rtol=0.15, atol=0)
    unreached = msfx.calibrate(sparse, images.split(4), tolerance=1e-5, progress=False)
    assert unreached.images == 400
    assert unreached.metadata["tolerance"] == "1e-05, not reached"
    with pytest.raises(CalibrationError, match="tolerance must be positive"):
        msfx.calibrate(sparse, [images], tolerance=0.0)


def test_groups_stay_few_and_lose_nothing():
    empty = Totals.empty([2], torch.device("cpu"))
    groups, total = Groups(empty), empty
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        batch = Totals((3,), *torch.rand(2, 2, generator=g, dtype=torch.float64), empty.sizes)
        total = total.merge(batch)
        groups.add(batch)
    assert len(groups.closed) < 64
    whole = merge_all([*groups.closed, groups.open])
    assert whole.counts == total.counts == (900,)
    torch.testing.assert_close(whole.mean, total.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.m2, total.m2, rtol=1e-12, atol=0)


# Histograms


def test_bins_reach_eight_deviations_to_each_side():
    """Of each channel's own mean; one without a deviation has bins as one of deviation 1."""
    bins = ChannelHistogram.around(ChannelStatistics(4, *torch.tensor([[3.0, 5.0], [4 * 2.0**2, 0.0]]).double()))
    assert bins.low.tolist() == [3 - 8 * 2, 5 - 8]
    assert (bins.low + 256 * bins.width).tolist() == [3 + 8 * 2, 5 + 8]
    assert bins.counts.shape == (2, 256)


def test_histograms_count_every_value(net, images, tmp_path):
    seen = []
    net.bn.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone().double().numpy()))
    for batch in images.split(5):
        net(batch)
    values = np.concatenate(seen).transpose(1, 0, 2, 3).reshape(8, -1)
    sparse = msfx.transform(net, images)
    stats = msfx.calibrate(sparse, images.split(5), histograms=True, progress=False)
    assert moments(stats) == moments(msfx.calibrate(sparse, images.split(5), progress=False))
    stats.save(tmp_path / "s")
    histogram = msfx.Statistics.load(tmp_path / "s")["relu"].histogram
    assert histogram.counts.sum(1).tolist() == [values.shape[1]] * 8
    inside = histogram.share_inside(stats["relu"].mean, 0.3 * stats["relu"].std).numpy()
    exact = (np.abs(values - values.mean(1)[:, None]) <= 0.3 * values.std(1)[:, None]).mean(1)
    np.testing.assert_allclose(inside, exact, atol=0.01)  # a bin is a sixteenth of a deviation, 2.5 % of the values
    drawn = stats.histogram("relu", 2, 0.3)
    assert drawn.before.sum() == pytest.approx(1)
    assert drawn.after.sum() == pytest.approx(1)
    assert drawn.share == pytest.approx(exact[2], abs=0.01)
    with pytest.raises(StatisticsError, match="no site 'gleu'; there are gelu"):
        stats.figure("gleu", 0)
    with pytest.raises(StatisticsError, match="no channel 8"):
        stats.figure("relu", 8)
    shares = torch.cat([s.histogram.share_inside(s.mean, 0.3 * s.std) for s in stats.values()])
    own = stats.histogram()
    assert (stats.histogram("slope").site, stats.histogram(channel=1).channel) == ("slope", 1)
    alone = stats["slope"].histogram.share_inside(stats["slope"].mean, 0.3 * stats["slope"].std)
    assert alone[stats.histogram("slope").channel] == alone.median()
    site = stats[own.site]
    of_all = float(site.histogram.share_inside(site.mean, 0.3 * site.std)[own.channel])
    assert of_all == float(shares.median()), "by default neither the fullest nor a dead channel"


def test_a_standard_error_is_that_of_the_groups_means():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(16, 50, generator=g, dtype=torch.float64)
    sizes = torch.tensor([1])
    groups = [Totals((50,), v.mean()[None], (v - v.mean()).square().sum()[None], sizes) for v in values]
    found = precision(groups, ["a"])
    std = values.numpy().std()
    of_mean = values.numpy().mean(1).std(ddof=1) / np.sqrt(16) / std
    squares = ((values.numpy() - values.numpy().mean()) ** 2).mean(1)
    of_std = squares.std(ddof=1) / np.sqrt(16) / (2 * std) / std
    assert (found.mean_error, found.std_error) == pytest.approx((of_mean, of_std), rel=1e-9)
    assert (found.groups, found.site, found.channel) == (16, "a", 0)
    assert precision(groups[:15], ["a"]) is None


def test_a_loader_that_drops_its_last_batch(net, images, tmp_path):
    dataset = torch.utils.data.TensorDataset(images)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, drop_last=True)
    sparse = msfx.transform(net, images)
    assert msfx.calibrate(sparse, loader, progress=False).images == 10
    assert (Source(loader, sparse).images, Source(loader, sparse).batches) == (10, 2)
    whole = torch.utils.data.DataLoader(dataset, batch_size=5)
    assert (Source(whole, sparse).images, Source(whole, sparse).batches) == (12, 3)


@pytest.mark.parametrize("quantity", ["mean", "std"])
def test_the_least_known_channel_is_named(quantity):
    """Of sites with 1, 2 and 3 channels, some of which never change; groups of 10 and of 30 values."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((n, 6)) for n in [10, 30] * 10]
    for k, own in enumerate(values):
        own[:, 4] = own[:, 4] + k % 2 * 3 if quantity == "mean" else own[:, 4] * (1 + k % 2 * 3)
        own[:, [0, 5]] = 2
    sizes = torch.tensor([1, 2, 3])
    groups = [
        Totals((len(v),) * 3, torch.tensor(v.mean(0)), torch.tensor(((v - v.mean(0)) ** 2).sum(0)), sizes)
        for v in values
    ]
    found = precision(
        [*groups, Totals((0, 0, 0), torch.zeros(6).double(), torch.zeros(6).double(), sizes)], list("abc")
    )
    assert (found.site, found.channel, found.quantity, found.groups) == ("c", 1, quantity, 20)
    every = np.concatenate(values)
    mean, variance = every.mean(0), every.var(0)
    weights = np.array([len(v) for v in values])[:, None] / (19 * len(every))
    of_mean = np.sqrt((weights * [(v.mean(0) - mean) ** 2 for v in values]).sum(0))[1:5] / np.sqrt(variance[1:5])
    squares = [(((v - mean) ** 2).mean(0) - variance) ** 2 for v in values]
    of_std = np.sqrt((weights * squares).sum(0))[1:5] / (2 * variance[1:5])
    assert found.error == pytest.approx((of_mean if quantity == "mean" else of_std)[3], rel=1e-9)
    assert found.mean_error == pytest.approx(np.sqrt((of_mean**2).mean()), rel=1e-9)
    assert found.std_error == pytest.approx(np.sqrt((of_std**2).mean()), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_share_on_the_wrong_side_is_what_draws_give(alpha):
    """Each edge lies where mean and deviation put it; the share between there and where it belongs, in many draws."""
    g = torch.Generator().manual_seed(0)
    mean, std = 0.003 * torch.randn(400_000, generator=g).double(), 0.002 * torch.randn(400_000, generator=g).double()
    edges = ((side * alpha, side * alpha * (1 + std) + mean) for side in (-1, 1))
    wrong = sum((torch.special.ndtr(torch.tensor(own)) - torch.special.ndtr(put)).abs().mean() for own, put in edges)
    assert Precision(1, "a", 0, "mean", 0.003, 0.002, 16).moved(alpha) == pytest.approx(float(wrong), rel=0.01)


def test_groups_are_of_equal_length_and_count_batches_that_others_have():
    def part(count):
        return Totals((count,), torch.zeros(1).double(), torch.zeros(1).double(), torch.tensor([1]))

    groups = Groups(part(0))
    assert [groups.add(part(1)) for _ in range(63)] == [True] * 63
    assert len(groups.closed) == 63
    assert [groups.add(batch) for batch in (part(1), part(1), None, part(1), part(1))] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert [group.counts for group in groups.closed] == [(2,)] * 32 + [(1,), (2,)]
