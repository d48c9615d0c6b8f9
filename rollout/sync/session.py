"""What the engines are asked to do in a sync (trainer rank 0; the other ranks ask nothing)."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict

from rollcast.comm import Deadline, Group, TransferPlan
from rollcast.rollout.config import How, RolloutConfig
from rollcast.rollout.errors import EngineError
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.messages import Abandon, Commit, Receive, Reply, Request, Settle
from rollcast.rollout.protocol.replies import WORDS_SHARE


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
