"""Calibration by several processes over gloo: the same result as by one, uneven shards, and ranks that fail."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import meansparse_fx as msfx
from meansparse_fx import shards
from meansparse_fx.calibrate.totals import Totals, gather_totals
from meansparse_fx.data import ImageSet
from meansparse_fx.errors import CalibrationError, EvaluationError
from meansparse_fx.shards import Ranks

SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
"""

WORKER = """
import os, sys, time
import torch
torch.set_num_threads(1)
import torch.distributed as dist
import meansparse_fx as msfx
from meansparse_fx.zoo import load_model

what, spec, images, out = sys.argv[1:]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
images = torch.load(images, weights_only=True)
model = load_model(spec).eval()
if what == "other-model" and rank == 1:
    with torch.no_grad():
        next(model.parameters()).add_(1)
if what == "nan" and rank == 1:
    images[1::world][4] = float("nan")

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return len(images)
    def __getitem__(self, index):
        if what in ("die", "hang"):
            time.sleep(0.05)
            if rank == 1 and index > len(images) // 2:
                if what == "die":
                    os.kill(os.getpid(), 9)
                time.sleep(20 if index < len(images) // 2 + 4 else 0)
        return images[index]

loader = torch.utils.data.DataLoader(Slow(), batch_size=3, sampler=range(rank, len(images), world))
options = {"tolerance": {"tolerance": 0.05}, "histograms": {"histograms": True}}.get(what, {})
if what in ("die", "hang", "keep"):
    options = {"checkpoint": out + ".checkpoint", "every": 0.0}
sparse = msfx.transform(model, images[:2])
try:
    stats = msfx.calibrate(sparse, loader, group=dist.group.WORLD, timeout=5, progress=False, **options)
except msfx.MeanSparseError as error:
    print("error:", error)
    sys.stdout.flush()
    os._exit(3)
stats.save(f"{out}.{rank}")
dist.barrier()
"""


@pytest.fixture
def job(tmp_path):
    """Start WORLD processes of the worker; return what each printed, its exit code, and the seconds it took."""
    (tmp_path / "tiny_distributed.py").write_text(SOURCE)
    (tmp_path / "worker.py").write_text(WORKER)

    def start(what: str, world: int, images: torch.Tensor):
        torch.save(images, tmp_path / "images.pt")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spec = f"{tmp_path / 'tiny_distributed.py'}:net"
        command = [sys.executable, "-W", "ignore", tmp_path / "worker.py", what, spec, tmp_path / "images.pt"]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"MEANSPARSE_FX_LOWERING": "eager"}
        processes = [
            subprocess.Popen(
                [*command, tmp_path / "out"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | shared | {"RANK": str(rank)},
            )
            for rank in range(world)
        ]
        found = []
        try:
            for process in processes:
                out, err = process.communicate(timeout=300)  # imports, on a busy machine
                found.append((process.returncode, out, err))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        return found

    return start


@pytest.fixture
def images():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def alone(tmp_path, images, **options):
    """Return the statistics that one process measures."""
    from meansparse_fx.zoo import load_model

    sparse = msfx.transform(load_model(f"{tmp_path / 'tiny_distributed.py'}:net").eval(), images[:2])
    return msfx.calibrate(sparse, images.split(3), progress=False, **options)


def check_equal(got, expected) -> None:
    assert got.images == expected.images
    for name, site in expected.items():
        assert got[name].count == site.count
        # The merge rounds in float64, by another tree; the mean relative to the deviation it is used with.
        assert float(((got[name].mean - site.mean) / site.std).abs().max()) < 1e-12
        torch.testing.assert_close(got[name].m2, site.m2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 6, 10])
def test_shards_are_every_image_once(world, length) -> None:
    images = ImageSet(torch.zeros(length, 1, 2, 2), torch.arange(length), "made")
    loaders = [images.loader(2, (rank, world)) for rank in range(world)]
    shards = [[int(label) for _, labels in loader for label in labels] for loader in loaders]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(loader.sampler) for loader in loaders] == [len(s) for s in shards]


# Ranks in threads of one process: gloo is real, only what torch keeps once a process is shared.


@pytest.fixture
def threads(monkeypatch):
    """Run a function of a group in WORLD threads, each a rank; return what each returns, or the error of ours."""
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(group.size())))
    monkeypatch.setattr(shards, "_uses", defaultdict(lambda: itertools.repeat(0)))
    monkeypatch.setattr(shards, "LOOK_SECONDS", 0.01)

    def start(world: int, work) -> list:
        store = dist.HashStore()
        monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)

        def one(rank: int):
            group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world, timedelta(seconds=60))
            try:
                return work(group)
            except CalibrationError as error:
                return str(error)

        with warnings.catch_warnings(), ThreadPoolExecutor(world) as pool:
            warnings.filterwarnings("ignore", "You are using a Backend")  # it is one of gloo's own, and works
            return list(pool.map(one, range(world)))

    return start


def test_ranks_gather_in_order(threads) -> None:
    def work(group):
        with Ranks(group, timeout=60) as own:
            return own.gather(torch.tensor([own.rank, 7]), "here"), own.gather(torch.tensor(0.5 + own.rank), "there")

    for here, there in threads(3, work):
        assert [h.tolist() for h in here] == [[0, 7], [1, 7], [2, 7]]
        assert [float(t) for t in there] == [0.5, 1.5, 2.5]


def test_ranks_gather_totals(threads) -> None:
    def work(group):
        with Ranks(group, timeout=60) as own:
            mean = torch.arange(3).double() + own.rank
            totals = Totals((own.rank, 2**60 + own.rank), mean, mean + 10, torch.tensor([1, 2]))
            return gather_totals(own, [totals], "end")

    for totals in threads(3, work):
        for rank, got in enumerate(totals):
            assert got.counts == (rank, 2**60 + rank)
            assert (got.mean.tolist(), got.m2.tolist()) == (
                [rank, 1 + rank, 2 + rank],
                [10 + rank, 11 + rank, 12 + rank],
            )


def test_a_rank_that_fails_is_known_to_the_others(threads) -> None:
    def work(group):
        with Ranks(group, timeout=60) as own:
            if own.rank == 1:
                raise CalibrationError("no luck")
            own.gather(torch.zeros(1), "end")

    first, second, third = threads(3, work)
    assert second == "no luck"
    assert all("failed: " in error and error.endswith("no luck") for error in (first, third))


def test_a_rank_that_failed_stays_until_the_others_know(threads) -> None:
    """What they read it from may live in its process."""
    ended = {}

    def work(group):
        began = time.monotonic()
        try:
            with Ranks(group, timeout=60) as own:
                if own.rank == 1:
                    raise CalibrationError("no luck")
                time.sleep(0.5)
                own.gather(0, "end")
        finally:
            ended[group.rank()] = time.monotonic() - began

    assert threads(2, work) == ["rank 1 failed: no luck", "no luck"]
    assert ended[1] > 0.45


def test_groups_do_not_hear_each_other(threads, monkeypatch) -> None:
    """Two pairs work at the same time; where a rank of one fails, the other goes on."""
    members = {}
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: members[group])

    def work(group):
        pair, rank = divmod(group.rank(), 2)
        store = dist.PrefixStore(f"pair {pair}", distributed_c10d._get_default_store())
        own_group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        members[own_group] = [2 * pair, 2 * pair + 1]
        with Ranks(own_group, timeout=60) as own:
            if group.rank() == 0:
                raise CalibrationError("no luck")
            return own.gather(group.rank(), "end")

    assert threads(4, work) == ["no luck", "rank 0 failed: no luck", [2, 3], [2, 3]]


def test_a_lost_connection_is_an_error_of_ours(threads) -> None:
    def work(group):
        def lost(*_, **__):
            raise RuntimeError("connection reset by peer\nstack")

        with Ranks(group, error=EvaluationError) as own:
            own._dist = SimpleNamespace(all_gather_object=lost)
            with pytest.raises(EvaluationError, match=r"^lost another process \(connection reset by peer\)\. Check"):
                own.gather(1, "end")
        return True

    assert threads(2, work) == [True, True]


def test_a_failure_is_seen_between_batches_too(threads) -> None:
    def work(group):
        with Ranks(group, timeout=60) as own:
            if own.rank == 0:
                raise CalibrationError("no luck")
            for batch in range(1000):
                own.heartbeat(f"batch {batch}")
                time.sleep(0.01)

    assert threads(2, work) == ["no luck", "rank 0 failed: no luck"]


def test_a_silent_rank_counts_as_dead(threads) -> None:
    """Its last sign and the timeout are in the error; one that gives signs at the same place is alive, however slow."""

    def work(group):
        with Ranks(group, timeout=1.0) as own:
            if own.rank == 1:
                for _ in range(20):  # twice the timeout
                    own.heartbeat("batch 4")
                    time.sleep(0.1)
                time.sleep(2)
                raise CalibrationError("awake too late")
            began = time.monotonic()
            try:
                own.gather(torch.zeros(1), "end")
            finally:
                assert time.monotonic() - began > 1.5

    error, _ = threads(2, work)
    assert "rank 1 died or hangs: no sign of life for 1 s, the last was 'batch 4'" in error


def test_a_rank_that_never_came_counts_as_dead(threads) -> None:
    def work(group):
        time.sleep(0.4 * group.rank())
        with Ranks(group, timeout=0.1) as own:
            own.gather(torch.zeros(1), "end")

    assert "rank 1 died or hangs: no sign of life for 0.1 s, the last was 'none'" in threads(2, work)[0]


def test_signs_are_rare(threads, monkeypatch) -> None:
    """A sign a `LOOK_SECONDS`, not one a batch: the store is one process for all."""
    monkeypatch.setattr(shards, "LOOK_SECONDS", 60.0)

    def work(group):
        with Ranks(group, timeout=60) as own:
            for batch in range(5):
                own.heartbeat(f"batch {batch}")
            return own._read(own.rank)

    assert threads(2, work) == ["batch 0 #1"] * 2


@pytest.mark.parametrize(
    ("options", "count", "seen"),
    [
        ({"histograms": True}, 46, 46),
        ({"tolerance": 0.05}, 46, 36),
        ({"tolerance": 1e-09}, 37, 37),
        ({"histograms": True}, 2, 2),
    ],
)
def test_ranks_calibrate_as_one(threads, net, options, count, seen) -> None:
    """Uneven shards, two images a batch; with a tolerance all stop after as many batches, or none does and those with
    fewer batches wait for the others; one may have no image."""
    images = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    sparse = msfx.transform(net.double(), images[:2])
    copies = [copy.deepcopy(sparse) for _ in range(3)]

    def work(group):
        own = list(images[group.rank() :: 3].split(2)) if group.rank() < count else []
        return msfx.calibrate(copies[group.rank()], own, group=group, timeout=60, progress=False, **options)

    found = threads(3, work)
    one = msfx.calibrate(sparse, images[:seen].split(2), progress=False)
    for got in found:
        assert got.metadata == found[0].metadata
        if "tolerance" in options:
            reached = "reached" if seen < count else "not reached"
            assert got.metadata["tolerance"] == f"{options['tolerance']:g}, {reached}"
        check_equal(got, one)
        if "histograms" in options:
            assert all(site.histogram.counts.sum(1).tolist() == [site.count] * len(site.mean) for site in got.values())


def test_ranks_refuse_different_models_and_a_checkpoint_of_histograms(threads, net, tmp_path) -> None:
    images = torch.rand(4, 3, 9, 9)
    copies = [msfx.transform(net, images) for _ in range(2)]

    def work(group, **options):
        msfx.calibrate(copies[group.rank()], [images], group=group, timeout=60, progress=False, **options)

    for option in ({"tolerance": 0.1}, {"histograms": True}):
        errors = threads(2, partial(work, checkpoint=tmp_path / "c", **option))
        assert all("a checkpoint goes with neither tolerance nor histograms" in error for error in errors)
    with torch.no_grad():
        copies[1].conv1.weight.add_(1)
    assert all("the processes have different models" in error for error in threads(2, work))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "count"), [(2, 40), (3, 40), (3, 2)], ids=["even", "uneven", "one rank has nothing"])
def test_many_equal_one(job, tmp_path, images, world, count) -> None:
    done = job("plain", world, images[:count])
    assert [code for code, _, _ in done] == [0] * world, done
    files = [tmp_path / f"out.{rank}" for rank in range(world)]
    assert len({file.read_bytes() for file in files}) == 1
    check_equal(msfx.Statistics.load(files[0]), alone(tmp_path, images[:count]))


@pytest.mark.slow
def test_histograms_of_many_count_every_value(job, tmp_path, images) -> None:
    done = job("histograms", 3, images)
    assert [code for code, _, _ in done] == [0] * 3, done
    got = msfx.Statistics.load(tmp_path / "out.2")
    check_equal(got, alone(tmp_path, images))
    assert got["2"].histogram.counts.sum(1).tolist() == [got["2"].count] * 4


@pytest.mark.slow
def test_many_stop_together(job, tmp_path) -> None:
    images = torch.rand(301, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    done = job("tolerance", 2, images)
    assert [code for code, _, _ in done] == [0, 0], done
    first, second = (tmp_path / f"out.{rank}" for rank in range(2))
    assert first.read_bytes() == second.read_bytes()
    stats = msfx.Statistics.load(first)
    assert 48 <= stats.images < 301
    assert stats.metadata["tolerance"] == "0.05, reached"


@pytest.mark.slow
def test_a_failing_rank_tells_the_others_why(job, images) -> None:
    done = job("nan", 3, images)
    assert [code for code, _, _ in done] == [3, 3, 3], done
    assert "2: NaN or inf in the site's input, first in batch 1" in done[1][1]
    for rank in (0, 2):
        assert "rank 1 failed: 2: NaN or inf" in done[rank][1]


@pytest.mark.slow
def test_different_models_are_refused(job, images) -> None:
    done = job("other-model", 2, images)
    assert [code for code, _, _ in done] == [3, 3], done
    assert "different models" in done[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_dead_rank_is_an_error_and_the_checkpoint_is_kept(job, tmp_path, images, how) -> None:
    start = time.monotonic()
    done = job(how, 3, images)
    assert done[0][0] == done[2][0] == 3, done
    assert done[1][0] == (-signal.SIGKILL if how == "die" else 3)
    for rank in (0, 2):
        assert "rank 1 died or hangs" in done[rank][1] or "lost another process" in done[rank][1]
    if how == "die":
        assert time.monotonic() - start < 60
    assert {p.name for p in tmp_path.glob("*.checkpoint*")} == {f"out.checkpoint.rank{r}-of-3" for r in range(3)}
    again = job("keep", 3, images)
    assert [code for code, _, _ in again] == [0] * 3, again
    check_equal(msfx.Statistics.load(tmp_path / "out.0"), alone(tmp_path, images))


def model_and_images(tmp_path) -> tuple:
    """Return the arguments that name a model in float32 and 31 labelled images, four at a time."""
    (tmp_path / "tiny_distributed.py").write_text(SOURCE.replace(".double()", ""))
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (31, 8, 8), np.uint8), random.integers(0, 3, 31)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return f"{tmp_path / 'tiny_distributed.py'}:net", "--data", tmp_path / "data.npz", "--batch-size", "4"


@pytest.mark.slow
def test_torchrun(tmp_path) -> None:
    command = ["calibrate", *model_and_images(tmp_path), "--checkpoint", tmp_path / "c", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"MEANSPARSE_FX_LOWERING": "eager"}
    for before, out in ((launch, "two"), ([sys.executable], "one")):
        full = [*before, "-m", "meansparse_fx", *command, tmp_path / out]
        done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("1 sites, 31 images: ") == 1
    two, one = (msfx.Statistics.load(tmp_path / name) for name in ("two", "one"))
    assert two.images == one.images == 31
    # Float32 convolutions over batches of other sizes.
    torch.testing.assert_close(two["2"].mean, one["2"].mean, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("c*"))


@pytest.mark.slow
def test_torchrun_evaluates(tmp_path) -> None:
    given = model_and_images(tmp_path)
    environment = os.environ | {"MEANSPARSE_FX_LOWERING": "eager", "OMP_NUM_THREADS": "1"}

    def run(launch, *command) -> str:
        full = [*launch, "-m", "meansparse_fx", *command]
        done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run([sys.executable], "calibrate", *given, "--out", tmp_path / "s")
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for launch, out in ((two, "two"), ([sys.executable], "one")):
        attack = ("--attacks", "pgd,square", "--steps", "3", "--queries", "10", "--eps", "0.05", "--alpha", "0.3")
        printed = run(launch, "evaluate", *given, "--statistics", tmp_path / "s", *attack, "--out", tmp_path / out)
        assert printed.count("31 images, Linf eps 0.05") == 1, "one process reports"
        found.append(json.loads((tmp_path / out / "report.json").read_text()))
        found[-1].pop("seconds")
    assert found[0] == found[1]
