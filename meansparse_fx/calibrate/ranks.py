"""Floor 5: several processes, each with its own shard of the data, as one calibration.

Values travel once, at the end (and where a tolerance is checked). While it works, each process leaves a sign of life
in the process group's store and looks at the others': one that dies or hangs is an error on all within the timeout,
where a collective alone would notice only at the end of the pass. Imports torch.distributed only if asked for.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, TypeVar

import torch

from ..errors import CalibrationError
from ..shards import peer_lost, place
from .totals import Totals

T = TypeVar("T")

LOOK_SECONDS = 1.0  # between two looks at the others
_calls = itertools.count()  # calibrations so far, the same number on every rank: each gets keys of its own


class Ranks:
    """This process among the others; alone without a group.

    Args:
        group: Of torch.distributed; None for one process.
        timeout: Seconds without a sign of life after which another process counts as dead.

    Raises:
        CalibrationError: From every method: another process failed, died or is silent. A process says so
            itself if an exception leaves the block it is used as a context manager of.
    """

    def __init__(self, group: Any = None, timeout: float = 600.0) -> None:
        (self.rank, self.world), self._timeout = place(group), timeout
        if group is None:
            return
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store  # the only store that every group has

        self._dist, self._group = dist, group
        self._store = dist.PrefixStore(f"meansparse_fx.calibrate/{next(_calls)}", _get_default_store())
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
            with peer_lost(CalibrationError):
                self._look(sign)

    def gather(self, value: T, point: str) -> list[T]:
        """Return the value of every rank, in order, once all have reached ``point``; its tensors are on the CPU."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with peer_lost(CalibrationError):
            while not self._look(f"at {point}"):
                time.sleep(0.02)
            with torch.inference_mode(False):  # collectives keep track of versions
                self._dist.all_gather_object(found, value, group=self._group)
        return found

    def gather_totals(self, own: list[Totals], point: str) -> list[Totals]:
        """Return totals that every rank has as many of: those of the first, then of the next."""
        ranks = self.gather([(t.counts, torch.stack([t.mean, t.m2]).cpu()) for t in own], point)
        pairs = [(counts, values.to(own[0].mean.device)) for rank in ranks for counts, values in rank]
        return [Totals(counts, values[0], values[1], own[0].sizes) for counts, values in pairs]

    def _look(self, sign: str) -> bool:
        """Leave ``sign``, look at the others, and return whether all of them show the same one."""
        self._signs += 1
        self._store.set(str(self.rank), f"{sign} #{self._signs}")
        together, now = True, time.monotonic()
        for rank in self._others:
            theirs = self._read(rank)
            if theirs.startswith("failed"):
                raise CalibrationError(f"rank {rank} {theirs}")
            if theirs != self._seen[rank][0]:
                self._seen[rank] = (theirs, now)
            elif now - self._seen[rank][1] > self._timeout:
                raise CalibrationError(
                    f"rank {rank} died or hangs: no sign of life for {self._timeout:g} s, the last was "
                    f"{theirs.partition(' #')[0] or 'none'!r}. Checkpoints, if asked for, are kept: start again"
                )
            together &= theirs.partition(" #")[0] == sign
        return together

    def _read(self, rank: int) -> str:
        key = str(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""
