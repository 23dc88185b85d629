"""Floor 5: RobustBench's models by their names there, with random weights or with their own.

RobustBench is imported only when asked for. Imports floor 1 only.
"""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..arguments import some
from ..errors import ArtifactError, ModelError
from .robustbench_compat import construction, library
from .weights import load_weights, read_checkpoint

# Where RobustBench itself keeps what it downloads.
MODELS = Path("models")

_INPUT_SIZES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "imagenet": (3, 224, 224)}
_BY_HAND = "Fetch it by hand and pass it as weights= (--weights), or put it there"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of RobustBench's list, named as on its pages."""

    threat: str
    dataset: str
    name: str
    row: dict[str, Any]  # RobustBench's own: `model` builds it, `gdrive_id` finds the weights: one, or a list
    timm_name: str | None  # of models that RobustBench takes from timm

    def __str__(self) -> str:
        return f"robustbench:{self.threat}/{self.dataset}/{self.name}"

    @property
    def files(self) -> dict[Path, str]:
        """Where RobustBench, or timm, keeps each file of the weights, and where it is to be had."""
        if self.timm_name is not None:
            url = library().utils.timm.get_pretrained_cfg(self.timm_name).url
            return {Path(torch.hub.get_dir(), "checkpoints", Path(url).name): url}
        ids = self.row["gdrive_id"]
        names = {f"{self.name}.pt_m{i}.pt": one for i, one in enumerate(ids)}
        names = names if isinstance(ids, list) else {f"{self.name}.pt": ids}
        directory = MODELS / self.dataset / self.threat
        return {directory / name: f"https://drive.google.com/uc?id={one}" for name, one in names.items()}


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
    """Return the model ``THREAT/DATASET/NAME`` with random weights, in eval mode; nothing is downloaded."""
    return _build(_entry(name))


def load(name: str, weights: str | Path | None = None) -> nn.Module:
    """Return the model ``THREAT/DATASET/NAME`` with its weights, in eval mode.

    A state_dict of the model itself will do; others RobustBench's own loader puts in place, by its rules for each
    model. Reading is ours, so that nothing is unpickled.

    Args:
        weights: The file with the weights, or for an ensemble the directory of its files. None takes those in
            ``models/`` under the current directory, where RobustBench keeps them, and downloads what is missing.
    """
    entry = _entry(name)
    if entry.row["gdrive_id"] == "":
        raise ModelError(f"{entry} has torchvision's own weights: use torchvision:resnet50 and --normalise imagenet")
    paths = _given(entry, Path(weights)) if weights is not None else _fetched(entry)
    model = _build(entry)
    held = {file: read_checkpoint(path) for file, path in paths.items()}
    path, whole = next(iter(paths.values())), next(iter(held.values()))
    with contextlib.suppress(ModelError, ArtifactError):
        load_weights(model, path, whole)
        return model
    try:
        if entry.timm_name is None:
            return _load_as_robustbench(entry, model, held)
        state = whole.get("state_dict", whole) if isinstance(whole, Mapping) else whole
        return _build(entry, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as error:
        files = some(map(str, paths.values()))
        raise ModelError(f"{files}: weights of another model than {entry}; {_first_lines(error)}") from error


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


def _build(entry: Entry, **options: Any) -> nn.Module:
    with construction():
        try:
            if entry.timm_name is not None:
                classes = library().utils.DATASET_CLASSES[_dataset(entry.dataset)]
                model = library().utils.timm.create_model(entry.timm_name, num_classes=classes, **options)
            else:
                model = entry.row["model"]()
        except Exception as error:
            if options:  # the weights' fault
                raise
            raise ModelError(f"{entry} cannot be built: {type(error).__name__}: {_first_lines(error)}") from error
    return _ready(model, entry)


def _ready(model: Any, entry: Entry) -> nn.Module:
    model.eval()
    # CompositeModel (Bai2023) switches only some of its children.
    for module in model.modules():
        module.training = False
    if not hasattr(model, "default_cfg"):
        model.default_cfg = {"input_size": _INPUT_SIZES[entry.dataset]}  # as timm's models say it
    return model


def _given(entry: Entry, weights: Path) -> dict[str, Path]:
    names = [path.name for path in entry.files]
    if weights.is_dir():
        if missing := [name for name in names if not (weights / name).is_file()]:
            raise ModelError(f"{weights}: lacks {some(missing)} of {entry}")
        return {name: weights / name for name in names}
    if len(names) > 1:
        raise ModelError(f"{entry} has {len(names)} files: give the directory that holds {some(names)}")
    return dict.fromkeys(names, weights)


def _fetched(entry: Entry) -> dict[str, Path]:
    for path, url in entry.files.items():
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if entry.timm_name is not None:
                torch.hub.download_url_to_file(url, str(path))
            else:
                library().utils.download_gdrive_new(url.rpartition("=")[2], path)
            reason = "" if path.is_file() else "nothing came"
        except Exception as error:  # a download can fail in any way
            reason = f"{type(error).__name__}: {_first_lines(error)}"
        if reason:
            raise ModelError(f"{entry}: cannot fetch {url} to {path.resolve()} ({reason}). {_BY_HAND}")
    return {path.name: path for path in entry.files}


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def _entry(name: str) -> Entry:
    known = entries()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else "; threats: Linf, L2, corruptions; data: cifar10, ..."
        raise ModelError(f"robustbench has no model {name!r}, written as Linf/cifar10/NAME{hint}")
    threat, dataset, model = name.split("/")
    rows = library().model_zoo.model_dicts[_dataset(dataset)]
    row = next(rows[kind] for kind in rows if kind.value == threat)[model]
    # RobustBench asks timm first, too. Its rows for these models use names that timm has never had.
    timm_name = f"{model}_{dataset}_{threat}".lower().replace("-", "_")
    return Entry(threat, dataset, model, row, timm_name if library().utils.timm.is_model(timm_name) else None)


def _dataset(name: str) -> Any:
    return library().model_zoo.enums.BenchmarkDataset(name)
