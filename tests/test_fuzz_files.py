"""Damaged and foreign files: every reader gives an error of ours or a right result, in little memory."""

from __future__ import annotations

import copy
import gzip
import json
import random
import struct
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import meansparse_fx as msfx
from meansparse_fx.alpha.result import AlphaSearch, Move, Refinement
from meansparse_fx.data import load_images
from meansparse_fx.errors import MeanSparseError
from meansparse_fx.evaluate import AttackSettings, Check, Evaluation, ModelOutcome, PairedDifference
from meansparse_fx.evaluate.evidence import Evidence, verify
from meansparse_fx.evaluate.ledger import Ledger
from meansparse_fx.zoo.weights import load_weights

TIMES = 40  # damaged files of each kind
LIMIT = 64 * 2**20  # bytes: none of the files here holds more than a hundred thousand


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 4)).eval()
    images = torch.rand(6, 1, 8, 8)
    sparse = msfx.transform(net, images)
    return net, sparse, images, msfx.calibrate(sparse, [images], histograms=True, progress=False)


def statistics(path, model):
    model[3].save(path)
    return lambda: msfx.set_statistics(model[1], path)


def settings(path, model):
    net, sparse, images, measured = model
    msfx.set_statistics(sparse, measured)
    msfx.save(sparse, path)
    return lambda: msfx.load(path, net, images)(images)


class Batches(Sequence):
    """Images one by one; breaks off before ``end``."""

    def __init__(self, images, end):
        self.images, self.end = images, end

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index >= self.end:
            raise ZeroDivisionError
        return self.images[index][None]


def calibration(path, model):
    def read(end=6):
        options = {"histograms": True, "checkpoint": path, "every": 0.0, "tolerance": 1e-9, "progress": False}
        return msfx.calibrate(model[1], Batches(model[2], end), **options)

    with pytest.raises(ZeroDivisionError):
        read(4)
    return read


def ledger(path, _):
    def read():
        found = Ledger(path, {"eps": 0.1})
        found.require_same("batch 0", torch.zeros(2), torch.zeros(2))
        return found.get_or_compute("batch 0,base", lambda: {"clean": torch.ones(2, dtype=torch.bool)})

    with Ledger(path, {"eps": 0.1}):
        pass
    with Ledger(path, {"eps": 0.1}) as kept:
        kept.require_same("batch 0", torch.zeros(2), torch.zeros(2))
        kept.get_or_compute("batch 0,base", lambda: {"clean": torch.ones(2, dtype=torch.bool)})
    return read


def adversarial(path, model):
    net, sparse, images, _ = model
    with torch.no_grad():
        labels = net(images).argmax(1)
    rows, weights = ("clean", "apgd-ce/exact"), dict.fromkeys(("base", "sparse"), msfx.statistics.fingerprint(net))
    of_both = [{which: value.clone() for which in ("base", "sparse")} for value in (images, torch.full((6,), -1))]
    switches = {name: operator.switches() for name, operator in msfx.operators(sparse).items()}
    Evidence(images, labels, *of_both, rows, 0.1, "Linf", weights, 0.0, switches).save(path)
    return lambda: str(verify(path, sparse))


def safetensors(path, model):
    save_file(model[0].state_dict(), path := path.with_suffix(".safetensors"))
    return path, lambda: load_weights(copy.deepcopy(model[0]), path)


def state_dict(path, model):
    torch.save({"state_dict": model[0].state_dict(), "epoch": 3}, path := path.with_suffix(".pt"))
    return path, lambda: load_weights(copy.deepcopy(model[0]), path)


IMAGES, LABELS = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8), np.arange(4)


def npz(path, _, save=np.savez):
    save(path := path.with_suffix(".npz"), images=IMAGES, labels=LABELS)
    return path, lambda: load_images(path).images.sum()


def compressed(path, _):
    return npz(path, _, np.savez_compressed)


def npy(path, _):
    np.save(path / "images.npy", IMAGES)
    np.save(path / "labels.npy", LABELS)
    return path / "images.npy", lambda: load_images(path).images.sum()


def idx(path, _, suffix="", pack=bytes):
    for name, array in (("images-idx3", IMAGES[:, 0]), ("labels-idx1", LABELS.astype(np.uint8))):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (path / f"train-{name}-ubyte{suffix}").write_bytes(pack(head + array.tobytes()))
    return path / f"train-images-idx3-ubyte{suffix}", lambda: load_images(path, "train").images.sum()


def idx_gz(path, _):
    return idx(path, _, ".gz", lambda raw: gzip.compress(raw, mtime=0))


def cifar_binary(path, _):
    rows = np.arange(2 * 3073, dtype=np.uint64).astype(np.uint8).reshape(2, 3073)
    rows[:, 0] %= 10
    rows.tofile(path / "test_batch.bin")
    return path / "test_batch.bin", lambda: load_images(path, "test").images.sum()


def picture(path, _):
    from PIL import Image

    for name in "ab":
        (path / name).mkdir()
        Image.fromarray(np.full((9, 9, 3), 77, np.uint8)).save(path / name / "one.png")
    return path / "a" / "one.png", lambda: sum(image.sum() for image, _ in load_images(path, image_size=8))


OUTCOMES = ModelOutcome(torch.ones(3) > 0, {"apgd-ce/exact": torch.arange(3) > 1})


def search(path, _):
    moves = (Move("a", 0.2, 1.0, 3, PairedDifference(0.0, -1.0, 1.0, 1.0), False),)
    refinement, threat = Refinement(0.1, OUTCOMES, moves), AttackSettings(0.1)
    rows = dict.fromkeys((0.0, 0.1), OUTCOMES)
    found = AlphaSearch({"a": 0.1}, rows, 0.003, others={"edge": rows}, refinement=refinement, threat=threat)
    found.save(path)
    return lambda: AlphaSearch.load(path)


def evaluation(path, _):
    checks = (Check("threat", True, "found"),)
    Evaluation(OUTCOMES, OUTCOMES, 0.1, 0.1, "Linf", 20, 500, 0, 1.5, checks=checks).save(path)
    return lambda: Evaluation.load(path)


FOLDERS = (npy, idx, idx_gz, cifar_binary, picture)
JSON = (search, evaluation)
READERS = (
    *(statistics, settings, calibration, ledger, adversarial),
    *(*JSON, safetensors, state_dict, npz, compressed, *FOLDERS),
)


def damaged(raw: bytes, choose: random.Random) -> bytes:
    """Return a file that a crash, a bad disk or a stranger could have made of one."""
    raw = bytearray(raw)
    way = choose.choice(("cut", "flip", "flip", "flip head", "flip head", "number", "insert", "zeros", "twice"))
    at = choose.randrange(len(raw))
    head = choose.randrange(min(len(raw), 200))
    if way == "cut":
        return bytes(raw[:at])
    if way in ("flip", "flip head"):
        raw[at if way == "flip" else head] = choose.randrange(256)
    elif way == "number":  # sizes and lengths
        raw[head : head + choose.choice((1, 2, 4, 8))] = b"\xff" * 8 if choose.random() < 0.5 else b"9" * 12
    elif way == "insert":
        raw[head:head] = bytes(choose.randrange(256) for _ in range(choose.choice((1, 8))))
    elif way == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    else:
        return bytes(raw) * 2
    return bytes(raw)


def survives(read) -> None:
    """Read; any other exception than ours is an error, and so is a large allocation."""
    tracemalloc.start()
    try:
        read()
    except (MeanSparseError, FileNotFoundError):
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < LIMIT, f"{peak} bytes"


def prepared(make, tmp_path, model):
    made = make(tmp_path if make in FOLDERS else tmp_path / "file", model)
    path, read = made if isinstance(made, tuple) else (tmp_path / "file", made)
    whole = path.read_bytes()
    read()
    return path, whole, read


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_damaged_bytes(make, tmp_path, model):
    path, whole, read = prepared(make, tmp_path, model)
    choose = random.Random(make.__name__)
    for number in range(TIMES):
        path.write_bytes(raw := damaged(whole, choose))
        try:
            survives(read)
        except Exception as error:
            raise AssertionError(f"file {number}, {len(raw)} bytes: {type(error).__name__}: {error}") from error


FORMATS = {"statistics": "2", "settings": "2", "calibration": "3", "ledger": "3", "adversarial": "2"}


@pytest.mark.parametrize("make", READERS[:5], ids=lambda make: make.__name__)
def test_a_file_is_of_the_format_that_others_read(make, tmp_path, model):
    """A number that changes refuses every file written before, so it does where the format does."""
    _, whole, _ = prepared(make, tmp_path, model)
    (entry,) = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"].values()
    header = json.loads(entry)
    assert header["format_version"] == FORMATS[make.__name__]
    if make is settings:
        assert header["settings"]["version"] == "1"


STRANGE = (None, -1, 1.5, 10**30, "x", [], {}, [[]], True, {"a": 1}, float("nan"))


def strange_header(header, choose):
    """Return a JSON value of which one part is another."""
    if choose.random() < 0.1:
        return choose.choice(STRANGE)
    spot, key, value = None, None, header
    while isinstance(value, dict | list) and value and (spot is None or choose.random() < 0.8):
        spot = value
        key = choose.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = spot[key]
    if spot is not None:
        if choose.random() < 0.15:
            del spot[key]
        else:
            spot[key] = choose.choice(STRANGE)
    return header


def strange_tensor(tensor, choose):
    return choose.choice(
        (
            lambda t: t.to(choose.choice((torch.float16, torch.int64, torch.bool, torch.uint8, torch.complex64))),
            lambda t: t.flatten()[: max(t.numel() - 1, 0)],
            lambda t: t.reshape(-1),
            lambda t: t[None],
            lambda t: torch.empty(0),
            lambda t: torch.full_like(t, -7) if t.dtype != torch.bool else ~t,
            lambda t: torch.full(t.shape, torch.nan),
        )
    )(tensor).clone()


@pytest.mark.parametrize("make", READERS[:5], ids=lambda make: make.__name__)
def test_strange_values(make, tmp_path, model):
    """Well-formed files, of which one part has another type, shape or value."""
    path, whole, read = prepared(make, tmp_path, model)
    size = int.from_bytes(whole[:8], "little")
    (kind, entry), *_ = json.loads(whole[8 : 8 + size])["__metadata__"].items()
    choose = random.Random(make.__name__)
    for number in range(TIMES):
        path.write_bytes(whole)
        tensors = _tensors(path)
        header = json.loads(entry)
        if choose.random() < 0.6:
            header = strange_header(header, choose)
        else:
            name = choose.choice(sorted(tensors))
            tensors[name] = strange_tensor(tensors[name], choose)
        save_file(tensors, path, metadata={kind: json.dumps(header)})
        try:
            survives(read)
        except Exception as error:
            raise AssertionError(f"file {number}: {type(error).__name__}: {error}\n{header}") from error


@pytest.mark.parametrize("make", JSON, ids=lambda make: make.__name__)
def test_strange_values_in_json(make, tmp_path, model):
    path, whole, read = prepared(make, tmp_path, model)
    choose = random.Random(make.__name__)
    for number in range(3 * TIMES):
        path.write_text(text := json.dumps(strange_header(json.loads(whole), choose)))
        try:
            survives(read)
        except Exception as error:
            raise AssertionError(f"file {number}: {type(error).__name__}: {error}\n{text}") from error


def _tensors(path):
    from safetensors.torch import load

    return load(path.read_bytes())
