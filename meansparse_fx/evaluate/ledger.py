"""Floor 5: what is known so far, image by image, kept on disk as it comes, so that a killed run goes on where it was.

An entry is the result of one piece of work: masks, by name, and the images that later pieces need. A piece is always
done the same way, whatever was done before it in the same process; so it does not matter where a run was interrupted.
Knows files; runs no model.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import artifacts
from ..errors import EvaluationError
from ..operators import OTHER_CHECKPOINT, get_alpha, operators
from ..statistics import Answers, fingerprint

FORMAT, VERSION = "meansparse_fx.attacked", "3"
# Seconds between two writings, and how many times as long as the last one took: a piece of work that takes longer is on
# disk as soon as it is done.
EVERY, TIMES = 1.0, 10

Masks = Mapping[str, Tensor]


class Ledger:
    """The results of one run, in memory, and in a file if there is a path.

    Args:
        path: None keeps nothing on disk.
        identity: What must be the same for the file to be of this run, by what it is in words.
        function: What the model computes, where that is known.

    Raises:
        EvaluationError: The file is of another run.
        ArtifactError: It is not a ledger at all, or cannot be written (WriteError).
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any], function: Answers | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._identity, self._function = dict(identity), function
        self._masks: dict[str, dict[str, Tensor]] = {}
        self._digests: dict[str, str] = {}
        self._before = 0.0
        self._began = self._written = time.monotonic()
        self._took = 0.0
        if self._path is not None:
            artifacts.require_place(self._path)
            artifacts.remove_partial(self._path)
            if self._path.exists():
                self._load(self._path)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()

    @property
    def seconds(self) -> float:
        """Seconds spent, those of the earlier processes included."""
        return self._before + time.monotonic() - self._began

    @property
    def batches(self) -> int:
        """How many batches have been attacked, the last of them perhaps not by every attack."""
        return len(self._digests)

    @property
    def attacks(self) -> int:
        """How many pieces of work other than looks at clean images are known."""
        return sum(not piece.endswith(", clean") for piece in self._masks)

    def require_same(self, what: str, images: Tensor, labels: Tensor) -> None:
        """Raise EvaluationError if a batch is not what it was when its results were found."""
        found = artifacts.digest(images, labels)
        if self._digests.setdefault(what, found) != found:
            raise EvaluationError(
                f"{self._path}: a checkpoint of other images, or of another order or batch size: {what} differs. Give "
                "the same images again, or remove it to start from the beginning"
            )

    def require_whole(self, batches: int) -> None:
        """Raise EvaluationError if fewer ``batches`` came, all in all, than an earlier process has attacked."""
        if missing := self.batches - batches:
            raise EvaluationError(
                f"{self._path}: a checkpoint of more images, {missing} batches of it did not come again: give the "
                "same images, or remove it to start from the beginning"
            )

    def get_or_compute(self, piece: str, work: Callable[[], Masks]) -> Masks:
        """Return the result of a piece of work, doing it if it is not known yet."""
        if piece not in self._masks:
            self._masks[piece] = {name: mask.cpu() for name, mask in work().items()}
            if time.monotonic() - self._written >= max(EVERY, TIMES * self._took):
                self.write()
        return self._masks[piece]

    def forget(self, prefix: str, name: str) -> None:
        """Leave out what is called ``name`` in the results of all pieces that begin with ``prefix``."""
        for piece, masks in self._masks.items():
            if piece.startswith(f"{prefix},"):
                masks.pop(name, None)

    def write(self) -> None:
        """Replace the file, if there is one, by what is known now."""
        if self._path is None:
            return
        began = time.monotonic()
        header = {
            "identity": self._identity,
            "function": self._function and asdict(self._function),
            "digests": self._digests,
            "pieces": {piece: list(masks) for piece, masks in self._masks.items()},
            "seconds": self.seconds,
        }
        tensors = {f"{piece}:{name}": mask for piece, masks in self._masks.items() for name, mask in masks.items()}
        artifacts.write(self._path, FORMAT, VERSION, header, tensors)
        self._written = time.monotonic()
        self._took = self._written - began

    def _load(self, path: Path) -> None:
        header, tensors = artifacts.read(path, FORMAT, VERSION, "a checkpoint of an evaluation")
        with artifacts.parsing(path):
            for what in {**self._identity, **header["identity"]}:
                there, here = header["identity"].get(what), self._identity.get(what)
                if there != here:
                    raise EvaluationError(
                        f"{path}: a checkpoint of another run, its {what} differ{_words(there, here)}: give it the "
                        f"same {what}, or remove it to start from the beginning"
                    )
            if "function" in header and not Answers.same(header["function"], self._function):
                raise EvaluationError(f"{path}: {OTHER_CHECKPOINT}")
            self._digests, self._before = dict(header["digests"]), float(header["seconds"])
            self._masks = {
                piece: {name: tensors[f"{piece}:{name}"] for name in names} for piece, names in header["pieces"].items()
            }


def _words(there: Any, here: Any) -> str:
    """Return how two values differ, of mappings the first entry that does."""
    if isinstance(there, dict) and isinstance(here, dict):
        name = next(name for name in there | here if there.get(name) != here.get(name))
        return f" ({name} was {there.get(name)} and is {here.get(name)})"
    return f" ({there} there, {here} here)" if here is not None else ""


def model_identity(sparse: nn.Module, alpha: bool) -> dict[str, Any]:
    """Return fingerprints of a transformed model's weights and of its operators.

    Args:
        alpha: Alpha and variant count as well: they do not where they are what is looked for.
    """
    state, found = hashlib.blake2b(digest_size=16), operators(sparse)
    for name, m in found.items():
        options = (m.channels, m.channel_dim, m.centre_mode, m.strict, m.steepness, m.backward_steepness)
        state.update(f"{name} {options}".encode())
        for vector in (m.get_buffer("mean"), m.get_buffer("std")):
            state.update(artifacts.tensor_bytes(vector))
    own: Any = state.hexdigest()
    if alpha:
        variants = {name: m.variant for name, m in found.items()}
        own = {"statistics": own, "alpha": get_alpha(sparse), "variant": variants}
    return {"weights": fingerprint(sparse), "statistics, alphas or variants": own}
