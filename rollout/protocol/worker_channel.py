"""Calls to an engine's workers that do not pass through vLLM: its event loop and scheduler take them when they can.

A sync is on the clock, so a worker hears of it on a connection and a thread of its own (`Bell`), and answers there
when it is over.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from rollcast.comm import Deadline
from rollcast.rollout.protocol.connection import frame, frames

HELLO, AT, GO, STOP, DONE = "hello", "at", "go", "stop", "done"
OTHERS = "the engine's other workers"


class Bells:
    """The engine process's side.

    address = await bells.open()                        # workers answer there: `Bell(address, rank, run)`
    results = await bells.ring("method", *arguments)    # of every worker, in the order of their ranks
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lines: dict[int, asyncio.StreamWriter] = {}
        self._round: _Round | None = None
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Listen, on this machine only; the address."""
        self._server = await asyncio.start_server(self._listen, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def ring(self, method: str, *arguments: Any) -> list[Any]:
        """Let every worker call a method of its bell's. Raises `RuntimeError` with the words of the first to fail."""
        round_ = self._round = _Round(self._round.number + 1 if self._round else 1)
        if missing := [rank for rank in range(self._workers) if rank not in self._lines]:
            raise RuntimeError(f"worker {missing[0]} cannot be reached")
        for rank in range(self._workers):
            self._tell(rank, round_.number, method, list(arguments))
        return await round_.results

    def _tell(self, rank: int, *message: Any) -> None:
        self._lines[rank].write(frame(msgspec.msgpack.encode(message)))

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One worker's line, until it ends."""
        rank = -1
        async for message in frames(reader):
            kind, number, *content = msgspec.msgpack.decode(message)
            if kind == HELLO:
                rank = number
                self._lines[rank] = writer
            elif self._round and number == self._round.number:
                self._take(self._round, rank, kind, content)
        self._lines.pop(rank, None)
        if self._round:
            self._fail(self._round, f"worker {rank} has ended")

    def _take(self, round_: "_Round", rank: int, kind: str, content: list[Any]) -> None:
        if kind == AT:
            round_.passed[rank] = content[0]
            if len(round_.passed) == self._workers:
                for each in range(self._workers):
                    self._tell(each, round_.number, GO, max(round_.passed.values()))
            return
        problem, result = content
        if problem:
            self._fail(round_, problem)
        round_.finish(rank, result, workers=self._workers)

    def _fail(self, round_: "_Round", problem: str) -> None:
        round_.fail(problem)
        # Others may wait for all to agree, with closed gates.
        for rank in self._lines:
            self._tell(rank, round_.number, STOP, None)


class _Round:
    """One ring, and what the workers have answered."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.passed: dict[int, int] = {}
        self.results: asyncio.Future[list[Any]] = asyncio.Future()
        self._found: dict[int, Any] = {}

    def fail(self, problem: str) -> None:
        if not self.results.done():
            self.results.set_exception(RuntimeError(problem))

    def finish(self, rank: int, result: Any, *, workers: int) -> None:
        self._found[rank] = result
        if len(self._found) == workers and not self.results.done():
            self.results.set_result([self._found[rank] for rank in range(workers)])


class Bell:
    """A worker's side: a thread that calls `run(method, arguments)` when the bell rings, one call at a time.

    `run` returns (problem or "", result).
    """

    def __init__(self, address: str, *, rank: int, workers: int, run: Callable[[str, list[Any]], list[Any]]) -> None:
        host, _, port = address.rpartition(":")
        line = socket.create_connection((host, int(port)))
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._line = Connection(line.detach())
        self.workers = workers
        self._run = run
        self._number = 0
        self._next: list[Any] | None = None
        self._say(HELLO, rank)
        threading.Thread(target=self._serve, name="rollcast-bell", daemon=True).start()

    def agree(self, passed: int, *, deadline: Deadline) -> int:
        """The largest `passed` of all workers that the bell has rung for.

        Raises `TimeoutError`, and `RuntimeError` when the engine process has given up meanwhile.
        """
        if self.workers == 1:
            return passed
        self._say(AT, self._number, passed)
        if not self._line.poll(deadline.left(OTHERS).total_seconds()):
            raise TimeoutError(f"waited in vain for {OTHERS}")
        number, kind, limit = message = self._hear()
        if (number, kind) == (self._number, GO):
            return limit
        if kind != STOP:
            self._next = message
        raise RuntimeError(f"{OTHERS} have failed")

    def _serve(self) -> None:
        # The line ends with the engine process.
        with contextlib.suppress(EOFError, OSError):
            while True:
                message, self._next = self._next or self._hear(), None
                self._number, method, content = message
                if method not in (GO, STOP):
                    self._say(DONE, self._number, *self._run(method, content))

    def _hear(self) -> list[Any]:
        return msgspec.msgpack.decode(self._line.recv_bytes())

    def _say(self, *message: Any) -> None:
        self._line.send_bytes(msgspec.msgpack.encode(message))
