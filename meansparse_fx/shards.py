"""Floor 1: work divided among processes, and what they found brought together.

While it works, each process leaves a sign of life in the process group's store and looks at the others': one that dies
or hangs is an error on all within the timeout, where a collective alone would notice only at the end.
Imports torch and errors, and torch.distributed only if there is a group.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from .errors import ArtifactError, CalibrationError, MeanSparseError, first_line

T = TypeVar("T")

LOOK_SECONDS = 1.0  # between two looks at the others
_uses: defaultdict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)  # by group: each gets keys of its own


def rank_and_world(group: Any) -> tuple[int, int]:
    """Return this process's rank and the number of processes in a group of torch.distributed; alone without one."""
    return (0, 1) if group is None else (group.rank(), group.size())


def file_of_rank(path: Path, rank: int, world: int) -> Path:
    """Return the file of one of several processes: ``PATH.rank0-of-2``; of one, ``PATH`` itself."""
    written = re.compile(re.escape(path.name) + r"\.rank\d+-of-(\d+)")
    others = {int(found[1]) for file in path.parent.glob("*") if (found := written.fullmatch(file.name))}
    others |= {1} if path.exists() else set()
    if strangers := others - {world}:
        raise ArtifactError(
            f"{path}: a checkpoint of {strangers.pop()} process(es), and now there are {world}: start as many again, "
            "or remove it to start from the beginning"
        )
    return path if world == 1 else path.with_name(f"{path.name}.rank{rank}-of-{world}")


class Ranks:
    """This process among the others; alone without a group.

    Args:
        group: Of torch.distributed; None for one process.
        timeout: Seconds without a sign of life after which another process counts as dead; by default none does, and
            the launcher must see to it that no process waits for one that is gone, as torchrun does.
        error: What every method raises if another process failed, died or is silent. A process says that it failed
            if an exception leaves the block it is used as a context manager of.
    """

    def __init__(
        self, group: Any = None, timeout: float = math.inf, error: type[MeanSparseError] = CalibrationError
    ) -> None:
        (self.rank, self.world), self._timeout, self._error = rank_and_world(group), timeout, error
        if group is None:
            return
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store  # the only store that every group has

        self._dist, self._group = dist, group
        members = tuple(dist.get_process_group_ranks(group))
        self._store = dist.PrefixStore(f"meansparse_fx/{members}/{next(_uses[members])}", _get_default_store())
        self._others = [rank for rank in range(self.world) if rank != self.rank]
        self._seen: dict[int, tuple[str, float]] = {rank: ("", time.monotonic()) for rank in self._others}
        self._signs, self._next_look = 0, 0.0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.world == 1 or error is None:
            return
        try:
            self._store.set(str(self.rank), f"failed: {error}")
            # The store may live in this process: stay until the others have read why, and failed too.
            for _ in range(50):
                if all(self._read(rank).startswith("failed") for rank in self._others):
                    break
                time.sleep(0.1)
        except RuntimeError:
            pass  # the store is gone, and with it whoever held it

    def heartbeat(self, sign: str) -> None:
        """Leave a sign of life, and look for the others', once in `LOOK_SECONDS`."""
        if self.world > 1 and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            with self._peer_lost():
                self._look(sign)

    def gather(self, value: T, point: str) -> list[T]:
        """Return the value of every rank, in order, once all have reached ``point``; its tensors are on the CPU.

        Values travel pickled.
        """
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self._peer_lost():
            while not self._look(f"at {point}"):  # a collective would time out where one has an hour more to do
                time.sleep(0.02)
            with torch.inference_mode(False):  # collectives keep track of versions
                self._dist.all_gather_object(found, value, group=self._group)
        return found

    @contextmanager
    def _peer_lost(self) -> Iterator[None]:
        """Raise an error of ours in the place of what torch.distributed raises when another process is gone."""
        try:
            yield
        except RuntimeError as error:
            lost = f"lost another process ({first_line(error)})"
            raise self._error(f"{lost}. Checkpoints, if asked for, are kept: start again") from error

    def _look(self, sign: str) -> bool:
        """Leave ``sign``, look at the others, and return whether all of them show the same one."""
        self._signs += 1
        self._store.set(str(self.rank), f"{sign} #{self._signs}")
        together, now = True, time.monotonic()
        for rank in self._others:
            theirs = self._read(rank)
            if theirs.startswith("failed"):
                raise self._error(f"rank {rank} {theirs}")
            if theirs != self._seen[rank][0]:
                self._seen[rank] = (theirs, now)
            elif now - self._seen[rank][1] > self._timeout:
                raise self._error(
                    f"rank {rank} died or hangs: no sign of life for {self._timeout:g} s, the last was "
                    f"{theirs.partition(' #')[0] or 'none'!r}. Checkpoints, if asked for, are kept: start again"
                )
            together &= theirs.partition(" #")[0] == sign
        return together

    def _read(self, rank: int) -> str:
        key = str(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""
