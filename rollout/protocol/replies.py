"""What engines answer (trainer ranks)."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from rollcast.comm import Deadline
from rollcast.comm.deadline import SPIN_S, nap
from rollcast.comm.report import WorkerReport
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import Received, Reply

R = TypeVar("R")
# Of a sync's timeout: how long an engine may take to say what went wrong.
WORDS_SHARE = 0.1


def collect(futures: "Sequence[Future[Reply]]", *, deadline: Deadline | None = None, soon: bool = False) -> list[Reply]:
    """Wait for all answers. Raises one `EngineError` with what every failed engine said.

    If they come `soon`, do not sleep: waking up would take as long.
    """
    start = time.perf_counter()
    while soon and not all(future.done() for future in futures) and time.perf_counter() - start < SPIN_S:
        nap(start, gentle=False)
    replies: list[Reply] = []
    failures: list[str] = []
    for engine, future in enumerate(futures):
        try:
            replies.append(future.result(deadline.left_s() if deadline else None))
        except EngineError as error:
            failures.append(str(error))
        except FutureTimeoutError:
            assert deadline is not None
            failures.append(f"engine {engine} did not answer within {deadline.timeout_s:g} s")
    if failures:
        raise EngineError("\n".join(failures))
    return replies


def expect(reply: Reply, kind: type[R]) -> R:
    """The reply, which must be of the given kind."""
    assert isinstance(reply, kind), reply
    return reply


def named(engine: int, text: str) -> str:
    return text if text.startswith(f"engine {engine}") else f"engine {engine}: {text}"


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
