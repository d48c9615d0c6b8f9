"""Side channel from the engine process to its workers (`WorkerChannel` there, `WorkerEndpoint` in each worker).

vLLM's `collective_rpc` is served only between scheduler iterations, and a sync cannot wait for that: so each worker
has a connection and a thread of its own for the calls of a sync.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from rollcast.comm import Deadline
from rollcast.comm.transport.sockets import connect_socket
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.connection import CONNECT_TIMEOUT_S, frame, frames

OTHER_WORKERS = "the engine's other workers"
# Share of a call's time that its replies may take on top: a worker that meets the deadline itself can say what it
# waited for. Less than the trainer then waits for the engine's own text (`rollout/sync/session.py`).
REPLY_SHARE = 0.05
logger = logging.getLogger(__name__)


class _Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a worker."""

    rank: int


class _WorkerCall(msgspec.Struct, frozen=True, tag=True):
    """Call a method. Answered by `_WorkerReply`."""

    number: int
    method: str
    phase: str
    """`Failure.phase` if it fails."""
    arguments: dict[str, Any]
    timeout_s: float


class _Position(msgspec.Struct, frozen=True, tag=True):
    """How many of vLLM's calls a worker has let in. Answered by `_StopAt` when all workers have sent theirs."""

    number: int
    calls: int


class _StopAt(msgspec.Struct, frozen=True, tag=True):
    """The number of vLLM's calls after which every worker stops."""

    number: int
    calls: int


class _GiveUp(msgspec.Struct, frozen=True, tag=True):
    """The call has failed: wait for the other workers no longer. Not answered."""

    number: int


class CallOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of a worker's method returns to the engine process."""

    failure: Failure | None = None
    """What the method raised, if it did."""
    result: Any = None


class _WorkerReply(msgspec.Struct, frozen=True, tag=True):
    """A worker's outcome of a call."""

    number: int
    outcome: CallOutcome


_FROM_WORKER = msgspec.msgpack.Decoder(_Hello | _Position | _WorkerReply)
_TO_WORKER = msgspec.msgpack.Decoder(_WorkerCall | _StopAt | _GiveUp)


class WorkerError(Exception):
    """A call failed in some workers: one `Failure` for each, without the engine's index."""

    def __init__(self, failures: Iterable[Failure]) -> None:
        self.failures = tuple(failures)
        super().__init__("; ".join(map(str, self.failures)))


def attempt(act: Callable[[], Any], *, worker: int, phase: str) -> CallOutcome:
    """Return the result of `act`, or what it raised as a `Failure`. Called in a worker."""
    try:
        return CallOutcome(result=act())
    except Exception as error:
        logger.exception("%s failed", phase)
        return CallOutcome(failure=Failure(text=str(error) or type(error).__name__, worker=worker, phase=phase))


class WorkerChannel:
    """The engine process's side. One call at a time: a new one supersedes one that is under way.

    address = await channel.open()                              # for each worker's `WorkerEndpoint`
    results = await channel.call("apply", phase="commit", timeout_s=5.0)    # of every worker, in the order of ranks
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._current: _PendingCall | None = None
        self._number = 0
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listen on this machine only. Return the address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def call(self, method: str, *, phase: str, timeout_s: float, **arguments: Any) -> list[Any]:
        """Call a method of every worker, whatever vLLM is doing there. Return the results in the order of ranks.

        Raises `WorkerError` as soon as one worker fails, ends or is not connected, and when workers have not replied
        shortly after `timeout_s`; others may then still be at work. `phase` is that of the failures.
        """
        if missing := [rank for rank in range(self._workers) if rank not in self._writers]:
            text = "not connected to the engine process"
            raise WorkerError(Failure(text=text, worker=rank, phase=phase) for rank in missing)
        if self._current is not None:
            self._current.fail(Failure(text="superseded by another call", phase=self._current.phase))
        self._number += 1
        pending = self._current = _PendingCall(self._number, phase, workers=self._workers)
        self._send(_WorkerCall(pending.number, method, phase, arguments, timeout_s))
        try:
            return await asyncio.wait_for(pending.results, timeout_s * (1.0 + REPLY_SHARE))
        except TimeoutError:
            text = f"no reply to {method!r} by its deadline of {timeout_s:g} s"
            raise WorkerError(Failure(text=text, worker=rank, phase=phase) for rank in pending.silent) from None
        finally:
            if pending.silent:
                # Those may wait for the others to agree, with closed gates.
                self._send(_GiveUp(pending.number))

    def _send(self, message: _WorkerCall | _StopAt | _GiveUp) -> None:
        data = frame(msgspec.msgpack.encode(message))
        for writer in self._writers.values():
            writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one worker's messages until its connection ends."""
        rank = None
        async for data in frames(reader):
            message = _FROM_WORKER.decode(data)
            if isinstance(message, _Hello):
                rank = message.rank
                self._writers[rank] = writer
            elif rank is not None and self._current is not None and message.number == self._current.number:
                self._take(self._current, rank, message)
        writer.close()
        if rank is not None:
            self._writers.pop(rank)
            if self._current is not None:
                text = "its connection to the engine process has ended"
                self._current.fail(Failure(text=text, worker=rank, phase=self._current.phase))

    def _take(self, pending: "_PendingCall", rank: int, message: _Position | _WorkerReply) -> None:
        if isinstance(message, _WorkerReply):
            pending.reply(rank, message.outcome)
            return
        pending.positions[rank] = message.calls
        if len(pending.positions) == self._workers:
            self._send(_StopAt(pending.number, max(pending.positions.values())))


class _PendingCall:
    """One call, and what the workers have answered."""

    def __init__(self, number: int, phase: str, *, workers: int) -> None:
        self.number = number
        self.phase = phase
        self.positions: dict[int, int] = {}
        self.results: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._workers = workers
        self._replies: dict[int, Any] = {}

    @property
    def silent(self) -> list[int]:
        """Ranks of the workers that have not replied."""
        return [rank for rank in range(self._workers) if rank not in self._replies]

    def fail(self, failure: Failure) -> None:
        """Fail the call, unless it is over."""
        if not self.results.done():
            self.results.set_exception(WorkerError([failure]))

    def reply(self, rank: int, outcome: CallOutcome) -> None:
        """Note a worker's reply: the first failure, or the last result, ends the call."""
        self._replies[rank] = outcome.result
        if outcome.failure is not None:
            self.fail(outcome.failure)
        elif not self.silent and not self.results.done():
            self.results.set_result([self._replies[rank] for rank in range(self._workers)])


class WorkerEndpoint:
    """A worker's side: a thread that calls `run(method, arguments, deadline)`, one call at a time.

    What `run` raises is the call's failure. The thread ends with the engine process.
    """

    def __init__(
        self,
        address: str,
        *,
        rank: int,
        workers: int,
        run: Callable[[str, dict[str, Any], Deadline], Any],
    ) -> None:
        self._connection = Connection(connect_socket(address, Deadline(CONNECT_TIMEOUT_S)).detach())
        self.workers = workers
        self._rank = rank
        self._run = run
        self._number = 0
        self._next: _WorkerCall | None = None
        self._send(_Hello(rank))
        threading.Thread(target=self._serve, name="rollcast-worker-endpoint", daemon=True).start()

    def agree(self, calls: int, *, deadline: Deadline) -> int:
        """Return the largest `calls` of all workers. Collective over the engine's workers, inside a call.

        Raises `TimeoutError`, and `RuntimeError` when the engine process has given up the call.
        """
        if self.workers == 1:
            return calls
        self._send(_Position(self._number, calls))
        while True:
            if not self._connection.poll(deadline.left(OTHER_WORKERS).total_seconds()):
                continue
            message = self._receive()
            if isinstance(message, _StopAt) and message.number == self._number:
                return message.calls
            if isinstance(message, _WorkerCall):
                self._next = message
            if isinstance(message, _WorkerCall) or message.number == self._number:
                raise RuntimeError("the engine process gave up the call: another worker failed")

    def _serve(self) -> None:
        # If the thread ends first, the engine process notices it by the end of the connection.
        with contextlib.suppress(EOFError, OSError), self._connection:
            while True:
                message, self._next = self._next or self._receive(), None
                if isinstance(message, _WorkerCall):
                    self._number = message.number
                    self._send(_WorkerReply(message.number, self._carry_out(message)))

    def _carry_out(self, call: _WorkerCall) -> CallOutcome:
        def act() -> Any:
            return self._run(call.method, call.arguments, Deadline(call.timeout_s))

        return attempt(act, worker=self._rank, phase=call.phase)

    def _receive(self) -> _WorkerCall | _StopAt | _GiveUp:
        return _TO_WORKER.decode(self._connection.recv_bytes())

    def _send(self, message: _Hello | _Position | _WorkerReply) -> None:
        self._connection.send_bytes(msgspec.msgpack.encode(message))
