"""One sync, from the trainer's call until the engines serve the new version (every trainer rank)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import torch

from rollcast.comm import Deadline, PhaseTimer, SyncReport, WeightBroadcaster, WeightSource
from rollcast.comm.agreement import Agreement, first_error, unanimous
from rollcast.comm.device.nvml import GpuReport, GpuState, gpu_state, gpu_uuid
from rollcast.comm.report import WorkerReport
from rollcast.rollout.config import How, RolloutConfig
from rollcast.rollout.errors import SyncError
from rollcast.rollout.pool.client import collect
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.messages import Reply
from rollcast.rollout.protocol.registry import Card
from rollcast.rollout.sync.lanes import Lanes
from rollcast.rollout.sync.session import Commands, words_of, worker_reports

# Shares of the sync's timeout. What is left after the wire is for asking the engines what went wrong and for
# telling the other ranks, so that all of them raise in time.
WIRE_SHARE = 0.8


class PoolBroadcaster:
    """Pushes the trainer's weights to every engine of the pool.

        broadcaster = job.broadcaster(model)
        report = broadcaster.sync(version=step + 1)      # on every trainer rank

    The order is fixed: agree, receive everywhere, agree, commit everywhere (switch, caches, version), agree, hand out.
    A sync that fails anywhere raises `SyncError` on every trainer rank within `sync_timeout_s`; engines whose weights
    are not whole, or not everybody's, refuse to generate, and the next `sync` joins a new group and sends everything
    again.
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
        cards: Sequence[Card] = (),
    ) -> None:
        self._source = source
        self._pool = pool
        self._agreement = agreement
        self._config = config
        self._rank = rank
        self._host = host
        self._name = name
        self._attempt = 0
        self._agreed = False
        self._commands = Commands(pool, config=config, rank=rank)
        self._lanes = Lanes(pool, agreement, source.manifest, config=config, rank=rank, cards=cards)
        self._broadcaster: WeightBroadcaster | None = None
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

        Collective over the trainer ranks, which all get rank 0's report. `version` must grow. `mode`, `pause_mode`,
        `kv_cache` and `verify`: see `RolloutConfig` (for `mode`, `sync_mode`); None: as configured. With `hardware`
        rank 0's report has the GPUs' memory and NVLink traffic. Raises `ValueError` for bad input, and `SyncError`
        with the words of whoever failed.
        """
        how = self._config.how(mode=mode, pause_mode=pause_mode, kv_cache=kv_cache, verify=verify)
        if not hardware or self._rank:
            return self._sync(version, how)
        with GpuWatch(self._pool, self._lanes.device).during() as watch:
            report = self._sync(version, how)
        return replace(report, gpus=watch.reports)

    def self_test(self) -> SyncReport:
        """Send the weights that the engines already have, with `verify="full"`: not a byte may change.

        For a trainer that starts from the checkpoint that the engines have loaded. It proves the landing of this
        model against vLLM's own load. Collective over the trainer ranks; the version stays. Raises `SyncError`
        naming the tensors that changed. Not for adapters.
        """
        return self._sync(self.version, How("in_place", self._config.pause_mode, "kept", "full", unchanged=True))

    def _sync(self, version: int, how: How) -> SyncReport:
        # First of all: a rank whose call is refused must stay in step with those whose call is not.
        self._attempt += 1
        how.check()
        if self.closed:
            raise RuntimeError("this broadcaster was closed: the job is over, or job.broadcaster() made a newer one")
        timer = PhaseTimer()
        with timer("plan"):
            self._agree_on_plan(version, how)
        self._agreed = False
        try:
            workers = self._carry_out(version, how, timer)
        except SyncError:
            raise
        except BaseException as error:
            # Else the engines would hold back what they make for ever.
            self._end_early(type(error).__name__)
            raise
        report = SyncReport.of(version, self._source.manifest.nbytes, timer, workers)
        self._pool.metrics.synced(report)
        return report

    def _end_early(self, why: str) -> None:
        """Something has come between this rank and the end of a sync. The engines are told what was agreed on."""
        if self._agreed:
            self._commands.settle()
            return
        try:
            self._lanes.close()
        finally:
            self._commands.abandon(f"trainer rank {self._rank} gave it up: {why}")

    def _carry_out(self, version: int, how: How, timer: PhaseTimer) -> list[WorkerReport]:
        """Send, agree and commit: what the workers say of it."""
        timeout_s = self._config.sync_timeout_s
        end, deadline = Deadline(timeout_s), Deadline(timeout_s * WIRE_SHARE)
        receiving: list[Future[Reply]] = []
        error: Exception | None = None
        workers: list[WorkerReport] = []
        try:
            with timer("plan"):
                broadcaster = self._open(deadline)
            plan, groups = self._lanes.plan, [*self._lanes.groups.values()]
            assert plan is not None
            failure = self._commands.receive(receiving, version, how, plan=plan, groups=groups, deadline=deadline)
            for again in (False, True)[: 2 if how.verify == "full" else 1]:
                sent = self._send(broadcaster, deadline, timer, checksums=how.verify != "none" and not again)
                failure = failure or sent
            if failure is not None:
                raise failure
            with timer("control"):
                workers = worker_reports(collect(receiving, deadline=deadline, soon=True))
        except Exception as problem:
            error = problem
        with timer("control"):
            self._conclude(version, error, receiving, end)
        return workers

    def release(self) -> None:
        """Let go of the weights, here and in workers: before they leave the GPU. Not collective."""
        self._pool.call_workers("rollcast_release")
        self._source.release()
        if self._broadcaster is not None:
            self._broadcaster.release()

    def close(self) -> None:
        """Leave the weight group. Idempotent; `sync` is not possible afterwards."""
        self.closed = True
        self._lanes.close()

    def _open(self, deadline: Deadline) -> WeightBroadcaster:
        """The lanes' sender, on lanes that work. Raises on all ranks or on none."""
        if self._lanes.plan is None or self._broadcaster is None:
            plan = self._lanes.open(f"{self._name}/{self._attempt}", self._host, deadline)
            self._broadcaster = WeightBroadcaster(self._source, plan, rank=self._rank, device=self._lanes.device)
        return self._broadcaster

    def _decide(self, topic: str, word: str, deadline: Deadline) -> str:
        judge = unanimous if topic == "plan" else first_error
        return self._agreement.decide(f"{self._name}/{self._attempt}/{topic}", word, judge, deadline=deadline)

    def _agree_on_plan(self, version: int, how: How) -> None:
        """All trainer ranks must be about to send the same thing: a rank with another plan would hang the rest."""
        current = self._source.glance()
        what = "self-test" if how.unchanged else f"{how.mode}, verify {how.verify}"
        word = f"version {version} after {self.version}, {what}, weights {current.digest[:16]}{self._source.settings}"
        deadline = Deadline(self._config.trainer_timeout_s)
        try:
            verdict = self._decide("plan", word, deadline)
        except TimeoutError as late:
            verdict = str(late)
        if "did not come" in verdict:
            raise SyncError(f"sync of version {version} did not start: {verdict} (trainer_timeout_s)")
        if verdict:
            raise ValueError(verdict)
        self._source.check(current)
        if version <= self.version and not how.unchanged:
            raise ValueError(f"version must grow: {version} after {self.version}")

    def _send(
        self, broadcaster: WeightBroadcaster, deadline: Deadline, timer: PhaseTimer, *, checksums: bool
    ) -> Exception | None:
        """Send everything once. A failure is returned: the other ranks may have another walk before them."""
        try:
            # The agreement has glanced at the weights already.
            broadcaster.send(self._lanes.groups, deadline=deadline, timer=timer, checksums=checksums, looked=True)
        except Exception as error:
            for group in self._lanes.groups.values():
                group.close()
            return error
        return None

    def _conclude(self, version: int, error: Exception | None, receiving: "list[Future[Reply]]", end: Deadline) -> None:
        """Agree on the outcome; commit it, or raise the same `SyncError` on every rank."""
        try:
            words = self._decide("sent", words_of(error, receiving, timeout_s=self._config.sync_timeout_s), end)
            if not words and not self._commands.alone:
                words = self._decide("committed", self._commands.commit(version, end), end)
        except TimeoutError as late:
            words = str(late)
        if words:
            self._pool.metrics.failed()
            self._lanes.close()
            self._commands.abandon(words)
            raise SyncError(f"sync of version {version} failed: {words}") from error
        self.version, self._agreed = version, True
        self._commands.settle()


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
