"""One sync, from the trainer's call until the engines serve the new version (every trainer rank)."""

from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from torch import distributed as dist

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
from rollcast.comm.agree import Agreement
from rollcast.comm.report import WorkerReport
from rollcast.rollout.config import RolloutConfig
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
    ) -> None:
        self._source = source
        self._pool = pool
        self._agreement = agreement
        self._config = config
        self._rank = rank
        self._host = host
        self._plan = build_plan(source.manifest, bucket_bytes=config.bucket_bytes)
        self._broadcaster = WeightBroadcaster(source, self._plan)
        self._group: Group | None = None
        self._store: dist.TCPStore | None = None
        self.version = 0

    @property
    def is_sender(self) -> bool:
        """Whether this rank talks to the engines; the others gather shards with it."""
        return self._rank == SENDER

    def sync(self, *, version: int) -> SyncReport:
        """Send the weights as they are now; every engine serves them as `version` when this returns.

        Collective over the trainer ranks, which all get the sender's report. `version` must grow. Raises
        `ValueError` for bad input, and `SyncError` with the words of whoever failed.
        """
        if version <= self.version:
            raise ValueError(f"version must grow: {version} after {self.version}")
        timeout_s = self._config.sync_timeout_s
        end, deadline = Deadline(timeout_s), Deadline(timeout_s * WIRE_SHARE)
        timer = PhaseTimer()
        receiving: list[Future[Reply]] = []
        error: Exception | None = None
        workers: list[WorkerReport] = []
        try:
            with timer("plan"):
                self._agree_on_plan(version, deadline)
                if self.is_sender:
                    self._ensure_group(deadline)
                    receiving = self._start_receiving(version, deadline)
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
        """Leave the weight group. Idempotent."""
        if self._group is not None:
            self._group.close()
        self._group = self._store = None

    def _agree_on_plan(self, version: int, deadline: Deadline) -> None:
        """All trainer ranks must be about to send the same thing: a rank with another plan would hang the rest."""
        words = self._agreement.gather(f"version {version}, plan {self._plan.digest}", deadline=deadline)
        for rank, word in enumerate(words):
            if word != words[0]:
                raise ValueError(
                    f"trainer ranks 0 and {rank} disagree: {words[0]} against {word}; every "
                    "rank must call sync with the same version and a model of the same parameters"
                )

    def _ensure_group(self, deadline: Deadline) -> None:
        """Prepare the workers and join a group with them, unless the last sync left one that works."""
        if self._group is not None:
            return
        manifest = self._plan.manifest.to_bytes()
        self._pool.ask_all(Prepare(manifest, self._plan.bucket_bytes, self._plan.digest), deadline=deadline)
        self._store, address = host_store(self._host, timeout_s=deadline.left_s())
        transport = "nccl" if self._config.resolved_device() == "cuda" else "gloo"
        workers = self._config.tensor_parallel_size
        size = 1 + self._pool.engines * workers
        joining: list[Future[Any]] = [
            self._pool.request(engine, JoinGroup(transport, address, 1 + engine * workers, size, deadline.left_s()))
            for engine in range(self._pool.engines)
        ]
        # On a thread: an engine that fails to join is heard of at once, not when the deadline is over.
        thread = ThreadPoolExecutor(1, thread_name_prefix="rollcast-join")
        own = thread.submit(
            join_group,
            transport,
            self._store,
            rank=0,
            size=size,
            deadline=deadline,
            device=self._source.device,
        )
        thread.shutdown(wait=False)
        wait([*joining, own], timeout=deadline.left_s(), return_when=FIRST_EXCEPTION)
        collect([future for future in joining if future.done()])
        self._group = own.result(deadline.left_s())
        collect(joining, deadline=deadline)

    def _start_receiving(self, version: int, deadline: Deadline) -> "list[Future[Reply]]":
        workers = self._config.tensor_parallel_size
        receiving = [
            self._pool.request(
                engine,
                Receive(
                    version,
                    self._plan.digest,
                    1 + engine * workers,
                    self._config.pause_mode,
                    deadline.left_s(),
                ),
            )
            for engine in range(self._pool.engines)
        ]
        group = self._group
        assert group is not None
        for future in receiving:
            # A broadcast to a worker that gave up would spin until the deadline; leaving the group ends it.
            future.add_done_callback(lambda done: group.close() if done.exception() else None)
        return receiving

    def _conclude(self, version: int, error: Exception | None, receiving: "list[Future[Reply]]", end: Deadline) -> None:
        """Agree on the outcome; commit it, or raise the same `SyncError` on every rank."""
        words = self._gather(self._words(error, receiving), end)
        if not words:
            words = self._gather(self._commit(version, end) if self.is_sender else "", end)
        if words:
            self.close()
            if self.is_sender:
                self._abandon(words)
            raise SyncError(f"sync of version {version} failed: {words}") from error

    def _gather(self, words: str, deadline: Deadline) -> str:
        try:
            gathered = self._agreement.gather(words, deadline=deadline)
        except TimeoutError as late:
            return str(late)
        return "\n".join(dict.fromkeys(word for word in gathered if word))

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
        return (str(error) or type(error).__name__) + suffix

    def _commit(self, version: int, end: Deadline) -> str:
        deadline = Deadline(end.left_s() * (1.0 - WORDS_SHARE))
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
        return SyncReport(
            version,
            self._plan.manifest.nbytes,
            phases_s | {"apply": apply_s, "total": timer.total_s()},
            tuple(workers),
        )
