"""Connections to the engines: requests, replies, and the end of what waits for an engine that is lost (trainer)."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import msgspec

from rollcast.comm import Deadline
from rollcast.comm.deadline import SPIN_S, nap
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.connection import ID_BYTES, _Line, frame
from rollcast.rollout.protocol.messages import Failed, Reply, Request, named
from rollcast.rollout.protocol.registry import Roster
from rollcast.rollout.protocol.sampling import Piece

WATCH_S = 0.25
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    engine: int
    future: "Future[Reply]"
    on_piece: Callable[[Piece], None] | None


class Links:
    """One connection to each engine. Calls may come from any thread."""

    def __init__(self, roster: Roster, addresses: Sequence[str]) -> None:
        self._roster = roster
        self._ids = itertools.count()
        self._waiting: dict[bytes, _Waiting] = {}
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lines = [_Line(address) for address in addresses]
        self._threads = [self._thread(self._listen, engine) for engine in range(len(self._lines))]
        self._threads.append(self._thread(self._watch))

    @property
    def engines(self) -> int:
        """Number of engines."""
        return self._roster.engines

    def request(
        self, engine: int, request: Request, *, on_piece: Callable[[Piece], None] | None = None
    ) -> "Future[Reply]":
        """Send a request to one engine. The future raises `EngineError` if the engine fails or dies.

        `on_piece` is called with every `Piece` before the reply, on a thread of the pool's.
        """
        return self.request_all([(engine, request)], on_piece=on_piece)[0]

    def request_all(
        self, requests: Sequence[tuple[int, Request]], *, on_piece: Callable[[Piece], None] | None = None
    ) -> "list[Future[Reply]]":
        """Send many requests, each to an engine: see `request`.

        An engine gets all of its own at once. It would start on the first of them meanwhile, and on few cores leave
        the sender none to send the rest.
        """
        messages: dict[int, list[bytes]] = {}
        futures: list[Future[Reply]] = []
        payloads = [(engine, msgspec.msgpack.encode(request)) for engine, request in requests]
        for engine, payload in payloads:
            future: Future[Reply] = Future()
            if request_id := self._enter(_Waiting(engine, future, on_piece)):
                messages.setdefault(engine, []).append(frame(request_id, payload))
            futures.append(future)
        for engine, its in messages.items():
            # By the caller's own thread, which need not wait for another to wake up.
            self._lines[engine].send(b"".join(its))
        return futures

    def ask_all(self, request: Request, *, deadline: Deadline | None = None) -> list[Reply]:
        """Send a request to all engines at once and wait for all answers."""
        return collect([self.request(engine, request) for engine in range(self.engines)], deadline=deadline)

    def close(self) -> None:
        """Stop talking to the engines; requests under way fail. Idempotent. The engines go on."""
        with self._lock:
            self._closed.set()
        self._lose_all("the pool was closed")
        for thread in self._threads:
            thread.join()

    def _enter(self, waiting: _Waiting) -> bytes | None:
        """From now on a reply is waited for; the number that it will have. None if the engine is lost."""
        with self._lock:
            if self._closed.is_set():
                raise EngineError("the pool is closed: generate and sync inside `with join(...)`")
            if waiting.engine not in self._lost:
                request_id = next(self._ids).to_bytes(ID_BYTES, "big")
                self._waiting[request_id] = waiting
                return request_id
        waiting.future.set_exception(EngineError(self._lost[waiting.engine]))
        return None

    def _thread(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name="rollcast-pool", daemon=True)
        thread.start()
        return thread

    def _listen(self, engine: int) -> None:
        """Take an engine's replies until it ends, which `_watch` hears of, with the reason."""
        try:
            self._take_replies(engine)
        except Exception as error:
            # Nobody would read this engine's replies from here on.
            self._lose(engine, f"engine {engine} sent what cannot be read: {error}")

    def _take_replies(self, engine: int) -> None:
        decoder = msgspec.msgpack.Decoder(Reply)
        for message in self._lines[engine].messages():
            reply = decoder.decode(message[ID_BYTES:])
            with self._lock:
                waiting = self._waiting.get(message[:ID_BYTES])
                if not isinstance(reply, Piece):
                    self._waiting.pop(message[:ID_BYTES], None)
            if waiting is not None:
                _hand_over(reply, waiting)

    def _watch(self) -> None:
        """Fail the requests of engines that are lost, and all requests when the job is over."""
        while not self._closed.wait(WATCH_S):
            try:
                lost, done = self._roster.lost(), self._roster.done()
            except Exception as error:
                self._lose_all(f"the job's store is gone: {error}")
                return
            for engine, text in lost.items():
                self._lose(engine, f"engine {engine} is lost: {text}")
            if done:
                self._lose_all("the job is over: a trainer has left it")

    def _lose_all(self, text: str) -> None:
        for engine in range(self.engines):
            self._lose(engine, text)

    def _lose(self, engine: int, text: str) -> None:
        with self._lock:
            text = self._lost.setdefault(engine, text)
            ids = [request_id for request_id, waiting in self._waiting.items() if waiting.engine == engine]
            futures = [self._waiting.pop(request_id).future for request_id in ids]
        for future in futures:
            future.set_exception(EngineError(text))
        # Who is about to send to it must not wait for it.
        self._lines[engine].close()


def _hand_over(reply: Reply, waiting: _Waiting) -> None:
    if isinstance(reply, Piece):
        assert waiting.on_piece is not None
        # The thread of all replies does not end with a listener's mistake.
        try:
            waiting.on_piece(reply)
        except Exception:
            logger.exception("a piece of a stream could not be handed over")
    elif isinstance(reply, Failed):
        waiting.future.set_exception(EngineError(named(waiting.engine, reply.text)))
    else:
        waiting.future.set_result(reply)


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
