"""Floor 5: RobustBench's models by their names there, with random weights or with their own.

RobustBench is imported only when asked for. Imports floor 1 only.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..arguments import some
from ..errors import ModelError
from .robustbench_mend import construction, library
from .weights import is_state_dict, load_weights, read_checkpoint, read_state_dict

# Where RobustBench itself keeps what it downloads.
MODELS = Path("models")

_INPUT_SIZES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "imagenet": (3, 224, 224)}
_BY_HAND = "Fetch it by hand and pass it as weights= (--weights), or put it there"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of RobustBench's list.

    Attributes:
        threat, dataset, name: As on its pages.
        row: RobustBench's own: ``model`` builds it, ``gdrive_id`` finds the weights: one, a list, or None for timm's.
        timm_name: How timm has it registered, for models that RobustBench takes from there; else None.
    """

    threat: str
    dataset: str
    name: str
    row: dict[str, Any]
    timm_name: str | None

    def __str__(self) -> str:
        return f"robustbench:{self.threat}/{self.dataset}/{self.name}"

    @property
    def files(self) -> dict[str, str]:
        """Names of the files with its weights, with where RobustBench has them."""
        ids = self.row["gdrive_id"]
        if isinstance(ids, list):
            return {f"{self.name}.pt_m{i}.pt": _drive(one) for i, one in enumerate(ids)}
        return {f"{self.name}.pt": _drive(ids)}


def entries() -> tuple[str, ...]:
    """Return the names of all models: ``Linf/cifar10/Wang2023Better_WRN-70-16`` and so on."""
    zoo = library().model_zoo.model_dicts
    return tuple(
        f"{threat.value}/{dataset.value}/{name}"
        for dataset, threats in zoo.items()
        for threat, rows in threats.items()
        for name in rows
    )


def architecture(name: str) -> nn.Module:
    """Return the model ``THREAT/DATASET/NAME`` with random weights, in eval mode; nothing is downloaded.

    Raises:
        ModelError: No such model, or RobustBench is not installed or cannot build it.
    """
    return _build(_entry(name))


def load(name: str, weights: str | Path | None = None) -> nn.Module:
    """Return the model ``THREAT/DATASET/NAME`` with its weights, in eval mode.

    RobustBench's own loader puts the tensors in place, by its own rules for each model; reading is ours, so that
    nothing is unpickled. A plain state_dict of the model itself will do as well.

    Args:
        weights: The file with the weights, or for an ensemble the directory of its files. None takes those in
            ``models/`` under the current directory, where RobustBench keeps them, and downloads what is missing.

    Raises:
        ModelError: No such model; a file cannot be fetched: says which, from where, and how to give it by hand; or the
            weights are another model's.
        ArtifactError: A file cannot be read.
    """
    entry = _entry(name)
    if entry.timm_name is not None:
        return _load_timm(entry, weights)
    if entry.row["gdrive_id"] == "":
        raise ModelError(f"{entry} has torchvision's own weights: use torchvision:resnet50 and --normalise imagenet")
    paths = _fetched(entry) if weights is None else _given(entry, Path(weights))
    model = _build(entry)
    held = {file: read_checkpoint(path) for file, path in paths.items()}
    whole = next(iter(held.values()))
    whole = whole.get("state_dict", whole) if isinstance(whole, Mapping) else whole
    if is_state_dict(whole) and whole.keys() == model.state_dict().keys():
        load_weights(model, next(iter(paths.values())))
        return model
    try:
        return _load_as_robustbench(entry, model, held)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as error:
        files = some(map(str, paths.values()))
        raise ModelError(f"{files}: weights of another model than {entry}; {_first_line(error)}") from error


def _load_as_robustbench(entry: Entry, model: nn.Module, held: dict[str, Any]) -> nn.Module:
    """Return ``model`` after RobustBench's loader has filled it from what the files held."""
    utils = library().utils
    with (
        tempfile.TemporaryDirectory() as empty,  # it makes directories and would fetch what it does not find in them
        mock.patch.object(utils, "download_gdrive_new"),
        mock.patch.object(torch, "load", lambda path, *args, **kwargs: held[Path(path).name]),
        mock.patch.dict(entry.row, model=lambda: model),
    ):
        return _ready(utils.load_model(entry.name, empty, entry.dataset, entry.threat), entry)


def _load_timm(entry: Entry, weights: str | Path | None) -> nn.Module:
    if weights is None:
        timm: Any = importlib.import_module("timm")
        url = timm.get_pretrained_cfg(entry.timm_name).url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _fetching(entry, url, path):
                torch.hub.download_url_to_file(url, str(path))
        weights = path
    state = read_state_dict(weights)
    model = _build(entry)
    if state.keys() == model.state_dict().keys():
        load_weights(model, weights)
        return model
    try:
        return _build(entry, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"{weights}: weights of another model than {entry}; {_first_line(error)}") from error


def _build(entry: Entry, **options: Any) -> nn.Module:
    with construction():
        try:
            if entry.timm_name is not None:
                timm = importlib.import_module("timm")
                classes = library().utils.DATASET_CLASSES[_dataset(entry.dataset)]
                model = timm.create_model(entry.timm_name, num_classes=classes, **options)
            else:
                model = entry.row["model"]()
        except Exception as error:
            if options:  # the weights' fault
                raise
            raise ModelError(f"{entry} cannot be built: {type(error).__name__}: {_first_line(error)}") from error
    return _ready(model, entry)


def _ready(model: Any, entry: Entry) -> nn.Module:
    model.eval()
    # CompositeModel (Bai2023) switches only some of its children.
    for module in model.modules():
        module.training = False
    if not hasattr(model, "default_cfg"):
        model.default_cfg = {"input_size": _INPUT_SIZES[entry.dataset]}  # as timm's models say it
    return model


# Files.


def _drive(gdrive_id: str) -> str:
    return f"https://drive.google.com/uc?id={gdrive_id}"


def _given(entry: Entry, weights: Path) -> dict[str, Path]:
    if not weights.is_dir():
        if len(entry.files) > 1:
            raise ModelError(f"{entry} has {len(entry.files)} files: give the directory that holds {some(entry.files)}")
        return dict.fromkeys(entry.files, weights)
    missing = [name for name in entry.files if not (weights / name).is_file()]
    if missing:
        raise ModelError(f"{weights}: lacks {some(missing)} of {entry}")
    return {name: weights / name for name in entry.files}


def _fetched(entry: Entry) -> dict[str, Path]:
    directory = MODELS / entry.dataset / entry.threat
    for file, url in entry.files.items():
        if not (directory / file).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            with _fetching(entry, url, directory / file):
                library().utils.download_gdrive_new(url.rpartition("=")[2], directory / file)
    return {file: directory / file for file in entry.files}


@contextlib.contextmanager
def _fetching(entry: Entry, url: str, path: Path) -> Iterator[None]:
    """Turn every way a download can fail into one error that says what to do."""
    try:
        yield
        reason = "" if path.is_file() else "nothing came"
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
    if reason:
        raise ModelError(f"{entry}: cannot fetch {url} to {path.resolve()} ({reason}). {_BY_HAND}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


# The list.


def _entry(name: str) -> Entry:
    threat, _, rest = name.partition("/")
    dataset, _, model = rest.partition("/")
    known = entries()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else "; threats: Linf, L2, corruptions; data: cifar10, ..."
        raise ModelError(f"robustbench has no model {name!r}, written as Linf/cifar10/NAME{hint}")
    rows = library().model_zoo.model_dicts[_dataset(dataset)]
    row = next(rows[kind] for kind in rows if kind.value == threat)[model]
    # RobustBench asks timm first, too. Its rows for these models use names that timm has never had.
    timm_name = f"{model}_{dataset}_{threat}".lower().replace("-", "_")
    registered = importlib.import_module("timm").is_model(timm_name)
    return Entry(threat, dataset, model, row, timm_name if registered else None)


def _dataset(name: str) -> Any:
    return library().model_zoo.enums.BenchmarkDataset(name)
