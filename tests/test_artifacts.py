"""Files that cannot be written: one sentence, and what took long to find is kept elsewhere."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch

import meansparse_fx as msfx
from meansparse_fx import artifacts
from meansparse_fx.artifacts import digest, require_place, write_folder, write_whole
from meansparse_fx.errors import WriteError
from meansparse_fx.statistics import ChannelStatistics


@pytest.fixture
def full(tmp_path):
    """A device without space; a link, so that what replaces it replaces only the link."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full")
    (tmp_path / "full").symlink_to("/dev/full")
    return tmp_path / "full"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture
def statistics():
    site = ChannelStatistics(6, torch.arange(3.0).double(), torch.ones(3).double(), None)
    return msfx.Statistics({"relu": site}, "0" * 32, 6, {}, "1" * 32, {})


def kept(error) -> Path:
    """Return the place that a message names."""
    return Path(re.search(r"it is kept as (\S+): move it", str(error.value))[1])


def check_kept(error, statistics, temporary):
    found = kept(error)
    assert temporary in found.parents
    assert torch.equal(msfx.Statistics.load(found)["relu"].mean, statistics["relu"].mean)


def test_a_digest_tells_types_shapes_and_tensors_apart_not_layouts():
    t = torch.arange(6.0)
    different = [(t,), (t.view(2, 3),), (t.view(torch.int32),), (t[:2], t[2:]), (t[:4], t[4:])]
    assert len({digest(*tensors) for tensors in different}) == 5
    assert digest(t.view(2, 3)) == digest(t.view(2, 3).T.contiguous().T)


def test_a_full_disk(full, statistics, temporary):
    with pytest.raises(WriteError, match=r"full: cannot be written \(No space left on device\)") as error:
        statistics.save(full)
    check_kept(error, statistics, temporary)
    assert full.is_symlink()


def test_a_disk_that_fills_up(tmp_path, statistics, temporary, monkeypatch):
    (tmp_path / "s").write_bytes(b"old")
    save = artifacts.save_file

    def no_space(tensors, path, metadata):
        if temporary not in Path(path).parents:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        save(tensors, path, metadata)

    monkeypatch.setattr(artifacts, "save_file", no_space)
    with pytest.raises(WriteError, match="No space left on device") as error:
        statistics.save(tmp_path / "s")
    check_kept(error, statistics, temporary)
    assert (tmp_path / "s").read_bytes() == b"old"
    assert {f.name for f in tmp_path.iterdir()} == {"s", "temporary"}


def test_a_directory_in_the_place(tmp_path, statistics, temporary):
    (tmp_path / "s").mkdir()
    with pytest.raises(WriteError, match="Is a directory") as error:
        statistics.save(tmp_path / "s")
    check_kept(error, statistics, temporary)


def test_no_directory(tmp_path, statistics, temporary):
    with pytest.raises(WriteError, match="No such file or directory") as error:
        statistics.save(tmp_path / "none" / "s")
    check_kept(error, statistics, temporary)


def test_no_space_anywhere(tmp_path, temporary):
    def make(place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match=r"\(No space left on device\), and neither can the temporary folder"):
        write_whole(tmp_path / "s", make, rescue=True)
    assert not list(temporary.iterdir())
    with pytest.raises(WriteError, match=r"\(No space left on device\)$"):
        write_whole(tmp_path / "s", make)


def test_bugs_stay_bugs(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "s", lambda place: 1 / 0, rescue=True)


def test_devices_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "fifo", lambda place: place.write_bytes(b"all of it"))
    assert os.read(reader, 99) == b"all of it"
    os.close(reader)


def test_folders(tmp_path):
    write_folder(tmp_path / "a" / "b", {"c": b"d"})
    assert (tmp_path / "a/b/c").read_bytes() == b"d"
    with pytest.raises(WriteError, match=r"c: cannot be written \((File exists|Not a directory)\)") as error:
        write_folder(tmp_path / "a/b/c", {"e": b"f"})
    assert (kept(error) / "e").read_bytes() == b"f"


def test_places_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    require_place(tmp_path / "new")
    require_place(tmp_path / "new" / "folder", folder=True)
    require_place(tmp_path, folder=True)
    for path, folder, problem in (
        (tmp_path, False, "is a directory; give the name of a file in it"),
        (tmp_path / "none" / "s", False, "its directory does not exist"),
        (tmp_path / "file", True, "is a file, no directory"),
        (tmp_path / "file" / "report", True, "is a file, no directory"),
        (Path("/proc/s"), False, "cannot be written"),
    ):
        with pytest.raises(WriteError, match=problem):
            require_place(path, folder)
    assert {f.name for f in tmp_path.iterdir()} == {"file", "temporary"}


def test_a_finished_calibration_needs_no_checkpoint(net, images, tmp_path, monkeypatch):
    sparse = msfx.transform(net, images)
    monkeypatch.setattr(artifacts, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.warns(UserWarning, match=r"c: cannot be written \(full\)"):
        found = msfx.calibrate(sparse, images.split(5), checkpoint=tmp_path / "c", progress=False)
    assert found.images == 12
    with pytest.raises(WriteError, match="its directory does not exist"):
        msfx.calibrate(sparse, images.split(5), checkpoint=tmp_path / "none" / "c", progress=False)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        artifacts.write(tmp_path / "a", "kind", "1", {}, {"x": torch.zeros(1)})
        artifacts.write_whole(tmp_path / "b", lambda place: place.write_text("b"))
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o666 & ~mask}
