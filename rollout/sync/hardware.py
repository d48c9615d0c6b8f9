"""Memory and NVLink traffic of the GPUs that take part in a sync (trainer rank 0)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rollcast.comm.device.nvml import GpuReport, GpuState, gpu_state, gpu_uuid
from rollcast.rollout.pool.pool import Pool


class GpuWatch:
    """Looks at the GPUs before and after a sync.

    with GpuWatch(pool, device).during() as watch:
        ...
    watch.reports
    """

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self.reports: tuple[GpuReport, ...] = ()

    @contextmanager
    def during(self) -> "Iterator[GpuWatch]":
        """Watch what happens inside. On CPU there is nothing to see."""
        before = self._states()
        yield self
        pairs = zip(before, self._states(), strict=True)
        self.reports = tuple(GpuReport.between(rank, *pair) for rank, pair in enumerate(pairs))

    def _states(self) -> Sequence[GpuState]:
        if self._device.type != "cuda":
            return []
        theirs = [GpuState(**state) for engine in self._pool.call_workers("rollcast_gpu_state") for state in engine]
        return [gpu_state(gpu_uuid(self._device)), *theirs]
