"""Floor 5: several processes, each with its own shard of the data, as one calibration.

Values travel once, at the end (and where a tolerance is checked). While it works, each process leaves a sign of life
in the process group's store and looks at the others': one that dies or hangs is an error on all within the timeout,
where a collective alone would notice only at the end of the pass. Imports torch.distributed only if asked for.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..seen import least_marks
from ..shards import peer_lost, place
from .totals import Totals

_NO_MARK = 2**63 - 1  # of no image
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

    def gather(self, value: Tensor, point: str) -> list[Tensor]:
        """Return the tensor of every rank, in order, once all have reached ``point``; shapes must agree."""
        if self.world == 1:
            return [value]
        with peer_lost(CalibrationError):
            while not self._look(f"at {point}"):
                time.sleep(0.02)
            device = torch.device("cuda") if self._dist.get_backend(self._group) == "nccl" else torch.device("cpu")
            own = value.to(device)
            # Not torch.empty_like in inference mode: collectives keep track of versions.
            with torch.inference_mode(False):
                own = own.clone()
                found = [torch.empty_like(own) for _ in range(self.world)]
                self._dist.all_gather(found, own, group=self._group)
            return [f.to(value.device) for f in found]

    def gather_totals(self, own: Totals, point: str) -> list[Totals]:
        """Return the totals of every rank, in order."""
        counts = self.gather(torch.tensor(own.counts), f"{point}, counts")
        values = self.gather(torch.stack([own.mean, own.m2]), point)
        return [Totals(tuple(c.tolist()), v[0], v[1], own.sizes) for c, v in zip(counts, values, strict=True)]

    def gather_marks(self, own: Tensor) -> Tensor:
        """Return the least of the marks of all ranks' images: see `Statistics.marks`."""
        longest = max(int(n) for n in self.gather(torch.tensor(len(own)), "number of marks"))
        filled = torch.cat([own, own.new_full((longest - len(own),), _NO_MARK)])
        found = least_marks(self.gather(filled, "marks"))
        return found[found < _NO_MARK]

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
