"""What the engines are asked to do in a sync (trainer rank 0; the other ranks ask nothing)."""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict

from rollcast.comm import Deadline, Group, TransferPlan
from rollcast.comm.report import WorkerReport
from rollcast.rollout.config import How, RolloutConfig
from rollcast.rollout.errors import EngineError
from rollcast.rollout.pool.client import collect
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.messages import Abandon, Commit, Receive, Received, Reply, Request, Settle, expect


class Commands:
    """Requests of one rank's broadcaster, to every engine of its pool."""

    def __init__(self, pool: Pool, *, config: RolloutConfig, rank: int) -> None:
        self._pool = pool
        self._config = config
        self._engines = range(pool.engines if rank == 0 else 0)

    @property
    def alone(self) -> bool:
        """Whether one trainer talks to one engine, whose word is all that a decision would be made of."""
        return self._pool.engines == 1 and self._config.trainers == 1

    def receive(
        self,
        replies: "list[Future[Reply]]",
        version: int,
        how: How,
        *,
        plan: TransferPlan,
        groups: Sequence[Group],
        deadline: Deadline,
    ) -> Exception | None:
        """Make every engine receive. What went wrong, if anything: the ranks must walk their weights first."""

        def leave_if_failed(done: "Future[Reply]") -> None:
            # A broadcast to a worker that gave up would last until the deadline; leaving the groups ends it.
            if done.exception():
                for group in groups:
                    group.close()

        size = self._config.tensor_parallel_size
        try:
            for engine in self._engines:
                workers = range(engine * size, (engine + 1) * size)
                request = Receive(
                    version=version,
                    digests=[plan.lane_of(worker).digest for worker in workers],
                    first_rank=1 + engine * size,
                    prefix_cache=self._config.prefix_cache,
                    alone=self.alone,
                    timeout_s=deadline.left_s(),
                    **asdict(how),
                )
                replies.append(self._pool.request(engine, request))
                replies[-1].add_done_callback(leave_if_failed)
        except Exception as error:
            return error
        return None

    def commit(self, version: int, end: Deadline) -> str:
        """Let every engine switch to the version: what went wrong, or nothing."""
        if not self._engines:
            return ""
        deadline = Deadline(max(end.left_s() * (1.0 - WORDS_SHARE), 0.1))
        try:
            self._pool.ask_all(Commit(version, deadline.left_s()), deadline=deadline)
        except EngineError as error:
            return str(error)
        return ""

    def settle(self) -> None:
        """Let every engine hand out what the new version makes. Does not wait."""
        self._tell(Settle())

    def abandon(self, words: str) -> None:
        """Tell every engine that the sync has failed, and how. Does not wait."""
        self._tell(Abandon(words))

    def _tell(self, request: Request) -> None:
        for engine in self._engines:
            self._pool.request(engine, request)


# Of a sync's timeout: how long an engine may take to say what went wrong.
WORDS_SHARE = 0.1


def worker_reports(replies: Sequence[Reply]) -> list[WorkerReport]:
    """What every worker of every engine says of a sync."""
    return [
        WorkerReport(worker.rank, worker.phases_s) for reply in replies for worker in expect(reply, Received).workers
    ]


def words_of(error: Exception | None, receiving: "Sequence[Future[Reply]]", *, timeout_s: float) -> str:
    """What went wrong in a sync of `timeout_s`, for ranks and user: an engine's own words if it has any."""
    if error is None:
        return ""
    wait(receiving, timeout=timeout_s * WORDS_SHARE)
    try:
        collect([future for future in receiving if future.done()])
    except EngineError as theirs:
        return str(theirs)
    silent = [str(engine) for engine, future in enumerate(receiving) if not future.done()]
    suffix = f"; no answer from engine {', '.join(silent)}" if silent else ""
    timeout = f" (sync_timeout_s is {timeout_s:g})" if silent else ""
    return (str(error) or type(error).__name__) + suffix + timeout
