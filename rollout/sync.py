"""One sync, from the trainer's call until the engines serve the new version (every trainer rank)."""

from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from rollcast.comm import (
    Deadline,
    Group,
    PhaseTimer,
    SyncReport,
    WeightBroadcaster,
    WeightSource,
    build_plan,
    host_store,
    join_group,
)
from rollcast.comm.agree import Agreement, first_error, unanimous
from rollcast.comm.report import WorkerReport
from rollcast.rollout.config import PAUSE_MODES, RolloutConfig, one_of
from rollcast.rollout.errors import EngineError, SyncError
from rollcast.rollout.pool import Pool, collect, expect
from rollcast.rollout.records import Abandon, Commit, JoinGroup, Prepare, Receive, Received, Reply

SENDER = 0
# Shares of the sync's timeout. What is left after the wire is for asking the engines what went wrong and for
# telling the other ranks, so that all of them raise in time.
WIRE_SHARE = 0.8
WORDS_SHARE = 0.1


class PoolBroadcaster:
    """Pushes the trainer's weights to every engine of the pool.

        broadcaster = job.broadcaster(model)
        report = broadcaster.sync(version=step + 1)      # on every trainer rank

    The order is fixed: agree, pause, receive everywhere, agree, then prefix cache, version and resume. A sync
    that fails anywhere raises `SyncError` on every trainer rank within `sync_timeout_s`; engines with torn
    weights refuse to generate, and the next `sync` joins a new group and sends everything again.
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
    ) -> None:
        self._source = source
        self._pool = pool
        self._agreement = agreement
        self._config = config
        self._rank = rank
        self._host = host
        self._name = name
        self._attempt = 0
        self._transport = "nccl" if config.resolved_device() == "cuda" else "gloo"
        on_gpu = self._transport == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._plan = build_plan(source.manifest, bucket_bytes=config.bucket_bytes)
        self._broadcaster = WeightBroadcaster(source, self._plan, device=self._device)
        self._group: Group | None = None
        self.closed = False
        self.version = version

    @property
    def is_sender(self) -> bool:
        """Whether this rank talks to the engines; the others gather shards with it."""
        return self._rank == SENDER

    def sync(self, *, version: int, pause_mode: str | None = None) -> SyncReport:
        """Send the weights as they are now; every engine serves them as `version` when this returns.

        Collective over the trainer ranks, which all get the sender's report. `version` must grow. `pause_mode`
        says what happens to requests in flight ("keep", "wait" or "abort"; None: as configured). Raises
        `ValueError` for bad input, and `SyncError` with the words of whoever failed.
        """
        pause_mode = pause_mode or self._config.pause_mode
        one_of("pause_mode", pause_mode, PAUSE_MODES)
        if self.closed:
            raise RuntimeError("this broadcaster was closed: the job is over, or job.broadcaster() made a newer one")
        self._attempt += 1
        timer = PhaseTimer()
        with timer("plan"):
            self._agree_on_plan(version)
        timeout_s = self._config.sync_timeout_s
        end, deadline = Deadline(timeout_s), Deadline(timeout_s * WIRE_SHARE)
        receiving: list[Future[Reply]] = []
        error: Exception | None = None
        workers: list[WorkerReport] = []
        try:
            with timer("plan"):
                if self.is_sender:
                    self._ensure_group(deadline)
                    receiving = self._start_receiving(version, pause_mode, deadline)
            self._broadcaster.send(self._group, deadline=deadline, timer=timer)
            with timer("control"):
                workers = self._reports(collect(receiving, deadline=deadline))
        except Exception as failure:
            error = failure
        with timer("control"):
            self._conclude(version, error, receiving, end)
        self.version = version
        return self._report(version, timer, workers)

    def close(self) -> None:
        """Leave the weight group. Idempotent; `sync` is not possible afterwards."""
        self.closed = True
        self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _decide(self, topic: str, word: str, deadline: Deadline) -> str:
        judge = unanimous if topic == "plan" else first_error
        return self._agreement.decide(f"{self._name}/{self._attempt}/{topic}", word, judge, deadline=deadline)

    def _agree_on_plan(self, version: int) -> None:
        """All trainer ranks must be about to send the same thing: a rank with another plan would hang the rest."""
        current = self._source.current()
        word = f"version {version} after {self.version}, weights {current.digest[:16]}"
        deadline = Deadline(self._config.trainer_timeout_s)
        try:
            verdict = self._decide("plan", word, deadline)
        except TimeoutError as late:
            verdict = str(late)
        if "did not come" in verdict:
            raise SyncError(f"sync of version {version} did not start: {verdict} (trainer_timeout_s)")
        if verdict:
            raise ValueError(verdict)
        if difference := self._plan.manifest.difference(current):
            raise ValueError(f"the trainer's weights changed since the broadcaster was made: {difference}")
        if version <= self.version:
            raise ValueError(f"version must grow: {version} after {self.version}")

    def _ensure_group(self, deadline: Deadline) -> None:
        """Prepare the workers and join a group with them, unless the last sync left one that works."""
        if self._group is not None:
            return
        manifest = self._plan.manifest.to_bytes()
        self._pool.ask_all(Prepare(manifest, self._plan.bucket_bytes, self._plan.digest), deadline=deadline)
        store, address = host_store(self._host, timeout_s=deadline.left_s())
        size = 1 + self._pool.engines * self._config.tensor_parallel_size
        joining: list[Future[Any]] = [
            self._pool.request(
                engine, JoinGroup(self._transport, address, self._first_rank(engine), size, deadline.left_s())
            )
            for engine in range(self._pool.engines)
        ]
        # On a thread: an engine that fails to join is heard of at once, not when the deadline is over.
        thread = ThreadPoolExecutor(1, thread_name_prefix="rollcast-join")
        own = thread.submit(
            join_group, self._transport, store, rank=0, size=size, deadline=deadline, device=self._device
        )
        thread.shutdown(wait=False)
        wait([*joining, own], timeout=deadline.left_s(), return_when=FIRST_EXCEPTION)
        collect([future for future in joining if future.done()])
        if not own.done():
            missing = [str(engine) for engine, future in enumerate(joining) if not future.done()]
            raise TimeoutError(f"engine {', '.join(missing)} did not join the weight group at {address} in time")
        self._group = own.result()
        collect(joining, deadline=deadline)

    def _start_receiving(self, version: int, mode: str, deadline: Deadline) -> "list[Future[Reply]]":
        digest = self._plan.digest
        receiving = [
            self._pool.request(engine, Receive(version, digest, self._first_rank(engine), mode, deadline.left_s()))
            for engine in range(self._pool.engines)
        ]
        group = self._group
        assert group is not None
        for future in receiving:
            # A broadcast to a worker that gave up would last until the deadline; leaving the group ends it.
            future.add_done_callback(lambda done: group.close() if done.exception() else None)
        return receiving

    def _first_rank(self, engine: int) -> int:
        """Group rank of an engine's first worker; rank 0 is the sender."""
        return 1 + engine * self._config.tensor_parallel_size

    def _conclude(self, version: int, error: Exception | None, receiving: "list[Future[Reply]]", end: Deadline) -> None:
        """Agree on the outcome; commit it, or raise the same `SyncError` on every rank."""
        try:
            words = self._decide("sent", self._words(error, receiving), end)
            if not words:
                words = self._decide("committed", self._commit(version, end) if self.is_sender else "", end)
        except TimeoutError as late:
            words = str(late)
        if words:
            self._leave()
            if self.is_sender:
                self._abandon(words)
            raise SyncError(f"sync of version {version} failed: {words}") from error

    def _words(self, error: Exception | None, receiving: "list[Future[Reply]]") -> str:
        """What to tell the other ranks and the user: an engine's own words where there are any."""
        if error is None:
            return ""
        wait(receiving, timeout=self._config.sync_timeout_s * WORDS_SHARE)
        try:
            collect([future for future in receiving if future.done()])
        except EngineError as theirs:
            return str(theirs)
        silent = [str(engine) for engine, future in enumerate(receiving) if not future.done()]
        suffix = f"; no answer from engine {', '.join(silent)}" if silent else ""
        timeout = f" (sync_timeout_s is {self._config.sync_timeout_s:g})" if silent else ""
        return (str(error) or type(error).__name__) + suffix + timeout

    def _commit(self, version: int, end: Deadline) -> str:
        deadline = Deadline(max(end.left_s() * (1.0 - WORDS_SHARE), 0.1))
        try:
            self._pool.ask_all(Commit(version, self._config.prefix_cache), deadline=deadline)
        except EngineError as error:
            return str(error)
        return ""

    def _abandon(self, words: str) -> None:
        for engine in range(self._pool.engines):
            self._pool.request(engine, Abandon(words))

    def _reports(self, replies: list[Reply]) -> list[WorkerReport]:
        return [
            WorkerReport(worker.rank, worker.phases_s)
            for reply in replies
            for worker in expect(reply, Received).workers
        ]

    def _report(self, version: int, timer: PhaseTimer, workers: list[WorkerReport]) -> SyncReport:
        apply_s = max((worker.phases_s.get("apply", 0.0) for worker in workers), default=0.0)
        phases_s = dict.fromkeys(("plan", "gather", "pack", "wire", "control"), 0.0) | timer.phases_s
        phases_s |= {"apply": apply_s, "total": timer.total_s()}
        return SyncReport(version, self._plan.manifest.nbytes, phases_s, tuple(workers))
