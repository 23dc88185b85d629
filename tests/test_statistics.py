"""The artifact: exact merge, safe files, and refusal of what does not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from meansparse_fx import artifacts
from meansparse_fx.errors import ArtifactError, StatisticsError
from meansparse_fx.observer import ChannelMoments
from meansparse_fx.statistics import (
    FORMAT,
    ChannelHistogram,
    ChannelStatistics,
    Statistics,
    fingerprint,
    weight_digests,
)
from meansparse_fx.statistics.histogram import stored_histogram
from meansparse_fx.statistics.summary import summary_table


def observed(x: torch.Tensor, splits: list[int], dim: int = 1) -> ChannelStatistics:
    observer = ChannelMoments("site", x.shape[dim], dim)
    total = ChannelStatistics(0, torch.zeros(x.shape[dim]).double(), torch.zeros(x.shape[dim]).double())
    for part in x.split(splits):
        assert observer(part) is part
        total = total.merge(observer.latest)
    return total


@given(
    splits=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda s: sum(s) > 0),
    offset=st.sampled_from([0.0, 1e4, -3e6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_moments_do_not_depend_on_the_split(splits, offset, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(splits), 3, 4, 5, generator=g) + offset
    got = observed(x, splits)
    flat = x.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    assert got.count == flat.shape[1]
    np.testing.assert_allclose(got.mean.numpy(), flat.mean(1), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(got.std.numpy(), flat.std(1), rtol=1e-9)


def test_half_precision_is_measured_exactly():
    x = (torch.randn(64, 4, 8, 8) + 100).bfloat16()
    flat = x.double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    got = observed(x, [10, 54])
    np.testing.assert_allclose(got.mean.numpy(), flat.mean(1), rtol=1e-13)
    np.testing.assert_allclose(got.std.numpy(), flat.std(1), rtol=1e-10)


def some(seed: int = 0, fingerprint: str = "abc") -> Statistics:
    x = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    tokens = torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(seed))
    sites = {"a.act": observed(x, [20]), "b": observed(tokens, [20], dim=2)}
    return Statistics(sites, fingerprint, 20, {"data": "noise"})


def test_file_round_trip(tmp_path):
    stats = some()
    stats.save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors")
    assert list(back) == list(stats)
    assert (back.fingerprint, back.images, back.metadata) == ("abc", 20, {"data": "noise"})
    for name in stats:
        assert back[name].count == stats[name].count
        assert torch.equal(back[name].mean, stats[name].mean)
        assert torch.equal(back[name].m2, stats[name].m2)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    some(0).save(path)
    before = path.read_bytes()

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("meansparse_fx.artifacts.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        some(1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_truncated_and_foreign_files_are_refused(tmp_path):
    good, cut, text, other = (tmp_path / n for n in ("good", "cut", "text", "other"))
    some().save(good)
    cut.write_bytes(good.read_bytes()[:-40])
    text.write_text("hello")
    save_file({"w": torch.zeros(2)}, other)
    for path in (cut, text):
        with pytest.raises(ArtifactError, match="truncated or not a statistics file"):
            Statistics.load(path)
    with pytest.raises(ArtifactError, match="not a statistics file of meansparse_fx"):
        Statistics.load(other)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "missing")


def test_merge_is_the_whole():
    a, b = some(0), some(1)
    whole = a.merge(b)
    assert whole.images == 40
    x = torch.cat([torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    direct = observed(x, [40])
    torch.testing.assert_close(whole["a.act"].mean, direct.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(whole["a.act"].m2, direct.m2, rtol=1e-12, atol=0)


def test_merge_refuses_another_model():
    with pytest.raises(StatisticsError, match="different models"):
        some().merge(some(fingerprint="other"))


@pytest.mark.parametrize(
    ("channels", "mark", "message"),
    [
        ({"a.act": 3, "b": 4}, "other", "other weights"),
        ({"a.act": 3}, "abc", "1 site.* the model lacks: b"),
        ({"a.act": 3, "b": 4, "c": 2}, "abc", "lack 1 site.*: c"),
        ({"a.act": 7, "b": 4}, "abc", "a.act: statistics of 3 channels for a site of 7"),
    ],
)
def test_what_does_not_fit_is_refused(channels, mark, message):
    with pytest.raises(StatisticsError, match=message):
        some().check(channels, mark)


def test_non_finite_statistics_are_refused():
    stats = some()
    stats["b"].mean[1] = float("nan")
    with pytest.raises(StatisticsError, match="b: statistics hold NaN"):
        stats.check({"a.act": 3, "b": 4})


def test_fingerprint_sees_weights_and_not_our_own_buffers(net):
    before = fingerprint(net)
    net.add_module("meansparse", torch.nn.BatchNorm1d(3))
    assert fingerprint(net) == before
    with torch.no_grad():
        net.head.bias[0] += 1
    assert fingerprint(net) != before


def test_files_of_the_first_format_are_named_as_such(tmp_path):
    save_file({"a:mean": torch.zeros(2)}, tmp_path / "old", metadata={FORMAT: '{"format_version": "1"}'})
    with pytest.raises(ArtifactError, match="format version 1; this release reads 2"):
        Statistics.load(tmp_path / "old")


def test_equal_statistics_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        some().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_merge_refuses_the_same_images_twice():
    with pytest.raises(StatisticsError, match="same images"):
        some().merge(some())


def test_merge_refuses_sites_that_were_something_else():
    own, other = (replace(some(seed), table={"b": {"activation": a}}) for seed, a in enumerate(("relu", "gelu")))
    with pytest.raises(StatisticsError, match=r"b is .*relu.* in one and .*gelu"):
        own.merge(other)


@given(seed=st.integers(0, 99), alpha=st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_share_inside_lies_between_the_bins(seed, alpha):
    """The estimate is at most one bin at each edge away from the truth."""
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bins, width = 64, 0.125
    counts = torch.bincount(((x + 4) / width).clamp(0, bins - 1).long(), minlength=bins)
    histogram = ChannelHistogram(torch.tensor([-4.0]).double(), torch.tensor([width]).double(), counts[None])
    got = float(histogram.share_inside(torch.zeros(1).double(), torch.tensor([alpha]).double()))
    low, high = (float((x.abs() <= a).double().mean()) for a in (alpha - width, alpha + width))
    assert low - 1e-12 <= got <= high + 1e-12


@pytest.mark.parametrize(
    "site",
    [
        ChannelStatistics(0, torch.zeros(3).double(), torch.zeros(3).double()),
        ChannelStatistics(5, torch.zeros(3).double(), torch.tensor([1.0, -1e-9, 1.0]).double()),
    ],
)
def test_what_was_not_measured_is_refused(site):
    stats = Statistics({"a": site}, "abc", 1)
    with pytest.raises(StatisticsError, match=f"a: count {site.count} or a negative m2"):
        stats.check({"a": 3})
    one = ChannelStatistics(1, torch.zeros(3).double(), torch.zeros(3).double())  # a channel that never changes
    Statistics({"a": one}, "abc", 1).check({"a": 3})


@pytest.mark.parametrize("hashed", [fingerprint, lambda model: weight_digests(model)["w"]])
def test_hashes_of_weights_see_types_and_shapes_of_equal_bytes(hashed):
    found = set()
    for tensor in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(2).double()):
        model = torch.nn.Module()
        model.register_buffer("w", tensor)
        found.add(hashed(model))
    assert len(found) == 4


def test_fingerprint_sees_types_shapes_and_names(net):
    zeros = [torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2)]
    found = {fingerprint(net)}
    for name in ("mask", "mark"):
        for value in zeros:
            net.register_buffer(name, value)
            found.add(fingerprint(net))
        del net._buffers[name]
    assert len(found) == 1 + 2 * len(zeros)


def test_merge_adds_up_whatever_one_of_them_lacks():
    one, two = replace(some(0), table={"b": {"activation": "relu"}}, graph="g"), some(1)
    two = replace(two, metadata={"data": "noise", "seed": "1"})
    assert (one.merge(two).metadata, two.merge(one).metadata) == ({"data": "noise", "seed": "1"},) * 2
    assert one.merge(replace(two, metadata={"data": "more"})).metadata == {"data": "noise + more"}
    assert one.merge(two).table == two.merge(one).table == one.table
    assert one.merge(two).graph == "g"


def test_merge_names_the_sites_that_differ():
    def named(names):
        return Statistics({n: ChannelStatistics(1, torch.zeros(1), torch.zeros(1)) for n in names}, "f", 1)

    with pytest.raises(StatisticsError, match=r"sites differ \(c, d\)$"):
        named("ac").merge(named("ad"))
    with pytest.raises(StatisticsError, match=r"sites differ \(b, c, d\)$"):
        named("a").merge(named("abcd"))
    with pytest.raises(StatisticsError, match=r"sites differ \(b, c, d, \.\.\.\)$"):
        named("a").merge(named("abcde"))


@pytest.mark.parametrize("changed", [{"count": 21}, {"mean": 1.0}, {"m2": 1.0}])
@pytest.mark.parametrize("name", ["a.act", "b"])
def test_what_differs_in_anything_is_of_other_images(name, changed):
    own = some()
    ((what, by),) = changed.items()
    site = replace(own[name], **{what: by if what == "count" else getattr(own[name], what) + by})
    assert own.merge(replace(own, sites={**own.sites, name: site})).images == 40


def test_moments_of_nothing_merge():
    empty = ChannelStatistics(0, torch.zeros(2).double(), torch.zeros(2).double())
    one = ChannelStatistics(1, torch.ones(2).double(), torch.zeros(2).double())
    assert (empty.merge(empty).count, empty.merge(empty).std.tolist()) == (0, [0, 0])
    assert (empty.merge(one).count, empty.merge(one).mean.tolist(), one.merge(empty).mean.tolist()) == (
        1,
        [1, 1],
        [1, 1],
    )
    with pytest.raises(StatisticsError, match="cannot merge 2 channels with 3"):
        one.merge(ChannelStatistics(1, torch.ones(3).double(), torch.zeros(3).double()))


def test_a_merge_has_no_histograms():
    histogram = ChannelHistogram(torch.zeros(1).double(), torch.ones(1).double(), torch.tensor([[2, 0]]))
    site = ChannelStatistics(2, torch.zeros(1).double(), torch.zeros(1).double(), histogram)
    assert site.merge(site).histogram is None


def test_a_share_counts_what_lies_inside_of_each_bin():
    low, width = torch.tensor([0.0, -1.0]).double(), torch.tensor([1.0, 0.5]).double()
    histogram = ChannelHistogram(low, width, torch.tensor([[2, 4, 2], [0, 0, 0]]))
    for centre, half, share in (
        (1.5, 0.5, 0.5),
        (1.0, 0.5, 0.375),
        (1.5, 9.0, 1.0),
        (0.0, 0.5, 0.125),
        (3.0, 0.5, 0.125),
    ):
        got = histogram.share_inside(torch.full((2,), centre).double(), torch.full((2,), half).double())
        assert got.tolist() == [share, 0]


def test_a_share_of_one_value_and_of_none():
    histogram = ChannelHistogram(torch.zeros(2).double(), torch.ones(2).double(), torch.tensor([[0, 1], [0, 0]]))
    assert histogram.share_inside(torch.ones(2).double(), torch.ones(2).double()).tolist() == [1, 0]


def test_few_images_of_many_are_the_same_images():
    """All of the small set are in the large one, of which they are a thousandth."""
    large = replace(some(0), marks=torch.arange(10_000))
    small = replace(some(1), marks=torch.arange(10))
    for one, other in ((large, small), (small, large)):
        with pytest.raises(StatisticsError, match="cannot merge: 100 % of the images of one are in the other"):
            one.merge(other)


def test_other_activations_are_refused():
    stats = replace(some(), table={"b": {"activation": "relu"}, "a.act": {}})
    channels = {"a.act": 3, "b": 4}
    for fits in ({"b": "relu"}, {"b": None}, {"a.act": "gelu"}, {"other": "gelu"}, None):
        stats.check(channels, activations=fits)
    with pytest.raises(StatisticsError, match="b: measured before relu, the model has gelu there"):
        stats.check(channels, activations={"b": "gelu"})


@pytest.mark.parametrize("what", ["mean", "m2"])
def test_what_is_not_finite_is_refused(what):
    stats = some()
    getattr(stats["a.act"], what)[2] = float("inf")
    with pytest.raises(StatisticsError, match=r"a\.act: statistics hold NaN or inf"):
        stats.check({"a.act": 3, "b": 4})


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(2, 1).double(), torch.zeros(3).double()])
@pytest.mark.parametrize("what", ["mean", "m2"])
def test_moments_of_another_form_are_no_statistics(tmp_path, what, bad):
    site = replace(ChannelStatistics(1, torch.zeros(2).double(), torch.zeros(2).double()), **{what: bad})
    facts = {"fingerprint": "f", "images": 1, "metadata": {}, "graph": "", "table": {}, "counts": {"a": 1}}
    artifacts.write(tmp_path / "s", FORMAT, "2", facts, {"a:mean": site.mean, "a:m2": site.m2})
    with pytest.raises(ArtifactError, match="of another form"):
        Statistics.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("fingerprint", 7),
        ("images", "20"),
        ("metadata", ["noise"]),
        ("graph", None),
        ("table", [["relu"]]),
        ("table", {"a": "relu"}),
        ("counts", {"a": -1}),
        ("counts", {"a": 1.0}),
        ("answers", {"shape": 3, "values": [], "exact": True}),
    ],
)
def test_a_fact_of_another_type_is_refused_by_whoever_reads_the_file(tmp_path, fact, value):
    """Where it is read, not where somebody prints or merges it."""
    facts = {"fingerprint": "f", "images": 1, "metadata": {}, "graph": "", "table": {}, "counts": {"a": 1}}
    moments = {f"a:{part}": torch.zeros(2).double() for part in ("mean", "m2")}
    artifacts.write(tmp_path / "s", FORMAT, "2", facts, moments)
    assert Statistics.load(tmp_path / "s").images == 1
    artifacts.write(tmp_path / "s", FORMAT, "2", facts | {fact: value}, moments)
    with pytest.raises(ArtifactError, match="damaged, or not written by this package"):
        Statistics.load(tmp_path / "s")


def test_statistics_without_histograms_say_so():
    with pytest.raises(StatisticsError, match=r"^no histograms in the statistics \(a merge has none\): calibrate"):
        some().histogram()
    with pytest.raises(StatisticsError, match=r"^b: no histograms"):
        some().histogram("b", 0)
    with pytest.raises(StatisticsError, match=r"no site 'z'; there are a\.act, b$"):
        some().histogram("z")


def of(count: int, mean: list[float], std: list[float], *histogram: list[list[float]]) -> ChannelStatistics:
    tensors = [torch.tensor(values).double() for values in (mean, std, *histogram[:2])]
    counted = ChannelHistogram(*tensors[2:], torch.tensor(histogram[2])) if histogram else None
    return ChannelStatistics(count, tensors[0], tensors[1].square() * count, counted)


def test_the_summary_has_a_row_a_site():
    """Half and three quarters of the values lie in the bin of the mean, of which the bands take 0.1, 0.2 and 0.3."""
    counted = of(12_000, [1, -2, 0], [0.5, 4, 0], [0, -4, 0], [1, 4, 1], [[50, 50], [3, 1], [9, 0]])
    sites = {"a": counted, "b": of(4, [3], [2]), "dead": of(4, [3], [0])}
    table = summary_table(Statistics(sites, "abc", 20, {"data": "noise"}, "g"))
    assert [list(column.cells) for column in table.columns] == [
        ["a", "b", "dead"], ["3", "1", "1"], ["1", "", "1"], ["12,000", "4", "4"], ["-2 to 1", "3 to 3", "3 to 3"],
        ["0 to 4", "2 to 2", "0 to 0"], ["2", "1.5", ""], [" 6.7  13.3  20.0", "", ""],
    ]  # fmt: skip
    assert str(table.columns[-1].header) == "% in band at 0.1, 0.2, 0.3"
    assert (table.title, table.caption) == ("3 sites, 20 images\ndata: noise", "weights abc, graph g")
    del sites["a"]
    table = summary_table(Statistics(sites, "abc", 20, {}))
    assert (len(table.columns), table.caption) == (7, "weights abc")


@pytest.mark.parametrize(
    ("alpha", "after", "share"),
    [
        (1.0, [0.1, 0.1, 0.5, 0.3], 0.3),  # half of the two bins beside the mean
        (4.0, [0, 0, 1, 0], 1.0),
        (0.0, [0.1, 0.2, 0.4, 0.3], 0.0),
    ],
)
def test_a_stored_histogram_moves_the_band_to_the_bin_of_the_mean(alpha, after, share):
    got = stored_histogram("s", of(10, [2.0], [0.5], [-1], [1], [[0, 1, 2, 4, 3, 0]]), 0, alpha, 7)
    assert got.edges.tolist() == [0, 1, 2, 3, 4]
    assert got.before.tolist() == [0.1, 0.2, 0.4, 0.3]
    assert (got.mean, got.threshold) == (2, alpha / 2 or -1)
    np.testing.assert_allclose((*got.after, got.share), (*after, share), atol=1e-15)


@pytest.mark.parametrize(("mean", "after"), [(-9.0, [1, 0]), (9.0, [0, 1])])
def test_a_mean_outside_of_the_stored_histogram_is_in_its_last_bin(mean, after):
    got = stored_histogram("s", of(4, [mean], [10.0], [0], [1], [[3, 1]]), 0, 2.0, 7)
    assert got.after.tolist() == after


def test_a_stored_histogram_of_one_value_and_of_none():
    assert stored_histogram("s", of(1, [0.5], [0], [0], [1], [[1, 0]]), 0, 0.2, 1).before.tolist() == [1]
    got = stored_histogram("s", of(0, [0.0], [0.0], [0], [1], [[0, 0]]), 0, 0.2, 0)
    assert (got.edges.tolist(), got.before.tolist(), got.share) == ([0, 1, 2], [0, 0], 0)
