"""Timing of one sync, phase by phase (both sides)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rollcast.comm.device.nvml import GpuReport


class PhaseTimer:
    """Adds up wall-clock seconds by phase.

    with timer("pack"):
        ...
    """

    def __init__(self) -> None:
        self.phases_s: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases_s[phase] = self.phases_s.get(phase, 0.0) + time.perf_counter() - start

    def total_s(self) -> float:
        """Return the seconds since the timer was made."""
        return time.perf_counter() - self._start


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Where one worker's time went in a sync."""

    rank: int
    """Number among the workers of all engines, engine by engine, from 1; 0 stands for the trainers."""
    phases_s: Mapping[str, float]
    """Seconds by phase: `wire` (waiting for broadcasts), `apply` (copies and vLLM's processing), `gate` (waiting for a
    step of vLLM's to end), `verify` (checksums, self-tests), `total`."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One sync, as trainer rank 0 measured it."""

    version: int
    nbytes: int
    """Bytes of weights, counted once, whatever the number of workers."""
    phases_s: Mapping[str, float]
    """Seconds by phase. On the trainer: `plan` (agree among ranks, make or check the lanes), `gather` (full tensors
    from shards), `pack` (cast and copy into buckets), `wire` (waiting for broadcasts), `control` (waiting for the
    engines' replies), `verify` (checksums). From the slowest worker: `apply`. `total` is from call to return."""
    workers: tuple[WorkerReport, ...] = ()
    gpus: tuple[GpuReport, ...] = ()
    """Memory and NVLink traffic of rank 0's GPU and of the workers' GPUs, if they were asked for."""

    @classmethod
    def of(cls, version: int, nbytes: int, timer: PhaseTimer, workers: Sequence[WorkerReport]) -> "SyncReport":
        """Make the report from the trainer's timer and the workers' reports."""
        apply_s = max((worker.phases_s.get("apply", 0.0) for worker in workers), default=0.0)
        phases_s = dict.fromkeys(("plan", "gather", "pack", "wire", "control"), 0.0) | timer.phases_s
        return cls(version, nbytes, phases_s | {"apply": apply_s, "total": timer.total_s()}, tuple(workers))

    @property
    def total_s(self) -> float:
        """Seconds from call to return."""
        return self.phases_s["total"]

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes of weights per second, over the whole sync."""
        return self.nbytes / 1e9 / self.total_s

    @property
    def slowest_rank(self) -> int:
        """Number, from 1, of the worker with the most seconds in all phases; 0 if there are no workers."""
        slowest = max(self.workers, key=lambda worker: sum(worker.phases_s.values()), default=None)
        return slowest.rank if slowest else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self) | {"gb_per_s": self.gb_per_s, "slowest_rank": self.slowest_rank}
