"""State that the methods of a layout share: a rank's weights, the engines, the broadcaster (every trainer rank)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from latency.bench import RPC_TIMEOUT_S, Sample
from latency.layouts import Layout
from latency.sharded_weights import RankWeights
from latency.trainer_ranks import TrainerRanks
from rollcast.comm import Deadline, SyncReport
from rollcast.rollout import Job, PoolBroadcaster

Fingerprints = list[list[dict[str, int]]]
"""Of every live tensor, by engine and worker."""


@dataclass(frozen=True)
class Span:
    """One rank's part of an update: two moments of the machine's clock, and phases."""

    start: float
    end: float
    phases_s: Mapping[str, float] = field(default_factory=dict)


def sample(spans: Sequence[Span]) -> Sample:
    """Return the update's time, from the first rank's start to the last one's end, with rank 0's phases."""
    seconds = max(span.end for span in spans) - min(span.start for span in spans)
    return Sample(seconds, dict(spans[0].phases_s))


class FreshLoad:
    """What the workers had after vLLM's own load, before anything of rollcast's arrived (rank 0)."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._fingerprints: Fingerprints = self._call("bench_fingerprint")
        self._loaded: list[list[list[str]]] = self._call("bench_loaded")

    def wrong_tensors(self) -> list[str]:
        """Return the tensors that differ from the fresh load."""
        return self._compared(lambda name, same, loaded: not same)

    def stale_tensors(self) -> list[str]:
        """Return the tensors that are as in the fresh load, of those that vLLM loads."""
        return self._compared(lambda name, same, loaded: same and name in loaded)

    def _compared(self, is_wrong: Callable[[str, bool, set[str]], bool]) -> list[str]:
        found: list[str] = []
        now = self._call("bench_fingerprint")
        for engine, workers in enumerate(self._fingerprints):
            for worker, before in enumerate(workers):
                after, loaded = now[engine][worker], set(self._loaded[engine][worker])
                names = sorted(before.keys() | after.keys())
                wrong = [name for name in names if is_wrong(name, before.get(name) == after.get(name), loaded)]
                found += [f"{name} (worker {worker} of engine {engine})" for name in wrong]
        return found

    def _call(self, method: str) -> Any:
        return self._job.pool.call_workers(method, deadline=Deadline(RPC_TIMEOUT_S))


class LayoutBench:
    """One trainer rank's weights in a layout, and the engines. All methods are collective over the trainer ranks.

    Weights change by negation alone, and begin as those of the fresh load.
    """

    def __init__(
        self, job: Job, ranks: TrainerRanks, layout: Layout, weights: RankWeights, *, fresh: FreshLoad | None
    ) -> None:
        """`fresh` is rank 0's."""
        self.job = job
        self.ranks = ranks
        self.layout = layout
        self.weights = weights
        self.broadcaster: PoolBroadcaster | None = None
        self.on_gpu = job.config.resolved_device() == "cuda"
        self._fresh = fresh
        self._negated = False
        self._allocated = 0

    def negate(self) -> None:
        """Negate every weight and wait until that is done."""
        torch._foreach_neg_(self.weights.local)
        self._negated = not self._negated
        if self.on_gpu:
            torch.cuda.synchronize()

    def sync(self) -> Sample:
        """Negate the weights and sync them, timed from call to return."""
        self.negate()
        return sample(self.ranks.together(self._sync_once))

    def _sync_once(self) -> Span:
        assert self.broadcaster is not None
        start = time.perf_counter()
        report = self.broadcaster.sync(version=self.broadcaster.version + 1)
        return Span(start, time.perf_counter(), phases(report))

    def first_sync(self) -> str | None:
        """Sync the other weights than those of the fresh load; return what did not change in the engines."""
        if self._negated:
            self.negate()
        self.sync()
        stale = self.ranks.together(lambda: self._fresh.stale_tensors() if self._fresh else [])[0]
        return f"{len(stale)} tensors did not change: {', '.join(stale[:3])}" if stale else None

    def mismatch(self) -> str | None:
        """Sync the weights of the fresh load, unless these were synced last; return what differs from it."""
        if self._negated:
            self.sync()
        wrong = self.ranks.together(lambda: self._fresh.wrong_tensors() if self._fresh else [])[0]
        return f"{len(wrong)} tensors differ from vLLM's own load: {', '.join(wrong[:3])}" if wrong else None

    def reset_peak(self) -> None:
        """Start a new peak of this rank's memory."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()

    def peak_extra_bytes(self) -> int | None:
        """Return the most that any trainer rank has allocated beyond what it had at `reset_peak`; unknown on CPU."""
        if not self.on_gpu:
            return None
        return max(self.ranks.together(lambda: torch.cuda.max_memory_allocated() - self._allocated))

    def close_broadcaster(self) -> None:
        """Leave the lanes, and free what they used on both sides."""
        if self.broadcaster is not None:
            broadcaster, self.broadcaster = self.broadcaster, None
            try:
                self.ranks.together(broadcaster.release)
            finally:
                broadcaster.close()


def phases(report: SyncReport) -> dict[str, float]:
    """Return the phases of a sync, with those of the slowest worker."""
    workers: dict[str, float] = {}
    for worker in report.workers:
        for phase, seconds in worker.phases_s.items():
            workers[f"worker {phase}"] = max(seconds, workers.get(f"worker {phase}", 0.0))
    return dict(report.phases_s) | workers
