"""`PoolBroadcaster`: syncs of the trainer's weights to all engines of a pool (every trainer rank)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from rollcast.comm import Deadline, SyncReport, WeightSource
from rollcast.comm.agreement import Agreement
from rollcast.comm.device.nvml import GpuReport, GpuState, gpu_state, gpu_uuid
from rollcast.rollout.config import RolloutConfig, SyncOptions
from rollcast.rollout.pool import Pool
from rollcast.rollout.protocol.registry import RankInfo
from rollcast.rollout.sync.lanes import Lanes
from rollcast.rollout.sync.session import SyncSession, start_topic


class PoolBroadcaster:
    """Pushes the trainer's weights to every engine of the pool.

        broadcaster = job.broadcaster(model)
        report = broadcaster.sync(version=step + 1)      # on every trainer rank

    Each call is one `SyncSession`; the transfer plan and the groups outlive it. A sync that fails anywhere raises
    `SyncError` on every trainer rank within `sync_timeout_s`. Engines whose weights are partially updated, or not the
    same everywhere, then refuse to generate, and the next `sync` joins new groups and sends everything again.
    """

    def __init__(
        self,
        source: WeightSource,
        pool: Pool,
        agreement: Agreement,
        *,
        config: RolloutConfig,
        rank: int,
        host: str,
        name: str,
        version: int,
        ranks: Sequence[RankInfo] = (),
    ) -> None:
        self._source = source
        self._pool = pool
        self._agreement = agreement
        self._config = config
        self._rank = rank
        self._name = name
        self._attempts = 0
        self._lanes = Lanes(pool.client, agreement, source, config=config, rank=rank, host=host, ranks=ranks)
        self.closed = False
        self.version = version

    def sync(
        self,
        *,
        version: int,
        mode: str | None = None,
        pause_mode: str | None = None,
        kv_cache: str | None = None,
        verify: str | None = None,
        hardware: bool = False,
    ) -> SyncReport:
        """Send the weights as they are now; every engine serves them as `version` when this returns.

        Collective over the trainer ranks; the report of rank 0 has the workers' times. `version` must grow. `mode`,
        `pause_mode`, `kv_cache` and `verify`: see `RolloutConfig` (for `mode`, `sync_mode`); None: as configured. With
        `hardware` rank 0's report has the GPUs' memory and NVLink traffic. Raises `ValueError` for bad input, and
        `SyncError`, with the failures of engines and ranks, when the sync failed.
        """
        options = self._config.sync_options(mode=mode, pause_mode=pause_mode, kv_cache=kv_cache, verify=verify)
        if not hardware or self._rank:
            return self._run_session(version, options)
        with GpuWatch(self._pool, self._lanes.device, timeout_s=self._config.sync_timeout_s).during() as watch:
            report = self._run_session(version, options)
        return replace(report, gpus=watch.reports)

    def self_test(self) -> SyncReport:
        """Send the weights that the engines already have, with `verify="full"`: not a byte may change.

        For a trainer that starts from the checkpoint that the engines have loaded: compares the landing of this model
        with vLLM's own load. Collective over the trainer ranks; the version stays. Raises `SyncError` naming the
        tensors that changed. Not for adapters.
        """
        options = SyncOptions("in_place", self._config.pause_mode, "kept", "full", unchanged=True)
        return self._run_session(self.version, options)

    def _run_session(self, version: int, options: SyncOptions) -> SyncReport:
        # Before any check: a rank whose call is refused must stay in step with those whose call is not.
        self._attempts += 1
        options.check()
        if self.closed:
            raise RuntimeError("this broadcaster was closed: the job is over, or job.broadcaster() made a newer one")
        session = SyncSession(
            version,
            options,
            served_version=self.version,
            topic=f"{self._name}/{self._attempts}",
            source=self._source,
            pool=self._pool,
            agreement=self._agreement,
            lanes=self._lanes,
            config=self._config,
            rank=self._rank,
        )
        try:
            return session.run()
        finally:
            if session.committed:
                self.version = version

    def release(self) -> None:
        """Release memory of the weights here and in the workers, before they leave the GPU. Not collective."""
        self._pool.call_workers("rollcast_release", deadline=Deadline(self._config.sync_timeout_s))
        self._source.release()
        self._lanes.release()

    def close(self) -> None:
        """Leave the lanes' groups. Idempotent; `sync` is not possible afterwards."""
        self.closed = True
        self._lanes.close()


def refuse_first_sync(agreement: Agreement, name: str, error: Exception) -> None:
    """Let the other ranks' first sync of the broadcaster `name` raise `ValueError`: this rank could not make it."""
    agreement.refuse(start_topic(f"{name}/1"), f"these weights cannot be sent: {error}")


class GpuWatch:
    """Compares the state of all GPUs before and after a sync (trainer rank 0).

    with GpuWatch(pool, device, timeout_s=60.0).during() as watch:
        ...
    watch.reports
    """

    def __init__(self, pool: Pool, device: torch.device, *, timeout_s: float) -> None:
        """`timeout_s` limits each of the two reads of all GPUs."""
        self._pool = pool
        self._device = device
        self._timeout_s = timeout_s
        self.reports: tuple[GpuReport, ...] = ()

    @contextmanager
    def during(self) -> "Iterator[GpuWatch]":
        """Report on what happens inside. On CPU there are no reports."""
        before = self._states()
        yield self
        pairs = zip(before, self._states(), strict=True)
        self.reports = tuple(GpuReport.between(rank, *pair) for rank, pair in enumerate(pairs))

    def _states(self) -> Sequence[GpuState]:
        if self._device.type != "cuda":
            return []
        engines = self._pool.call_workers("rollcast_gpu_state", deadline=Deadline(self._timeout_s))
        workers = [GpuState(**state) for engine in engines for state in engine]
        return [gpu_state(gpu_uuid(self._device)), *workers]
