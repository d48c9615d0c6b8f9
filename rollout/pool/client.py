"""Connections to the engines: requests, replies, and what happens to requests when an engine is lost (trainer)."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import msgspec

from rollcast.comm import Deadline
from rollcast.comm.deadline import SPIN_S, poll_sleep
from rollcast.rollout.errors import EngineError, Failure
from rollcast.rollout.protocol.connection import ID_BYTES, EngineConnection, frame
from rollcast.rollout.protocol.messages import Failed, Reply, Request
from rollcast.rollout.protocol.registry import EngineRegistry
from rollcast.rollout.protocol.sampling import Piece

WATCH_S = 0.25
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _PendingRequest:
    engine: int
    future: "Future[Reply]"
    on_piece: Callable[[Piece], None] | None


class EngineClient:
    """One connection to each engine. Calls may come from any thread.

        client = EngineClient(registry, addresses)
        future = client.request(0, Describe())
        replies = client.request_each(Describe())       # of every engine, in order

    One thread for each engine takes its replies; one more asks the registry which engines are lost.
    """

    def __init__(self, registry: EngineRegistry, addresses: Sequence[str]) -> None:
        self._registry = registry
        self._ids = itertools.count()
        self._pending: dict[bytes, _PendingRequest] = {}
        # By engine: why no reply will come from it any more.
        self._lost: dict[int, Failure] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._connections = [EngineConnection(address) for address in addresses]
        self._threads = [self._start_thread(self._listen, engine) for engine in range(len(self._connections))]
        self._threads.append(self._start_thread(self._watch))

    @property
    def engines(self) -> int:
        """Number of engines."""
        return self._registry.engines

    def request(self, engine: int, request: Request) -> "Future[Reply]":
        """Send a request to one engine. The future raises `EngineError` if the engine fails or dies."""
        return self.request_many([(engine, request)])[0]

    def request_many(
        self, requests: Sequence[tuple[int, Request]], *, on_piece: Callable[[Piece], None] | None = None
    ) -> "list[Future[Reply]]":
        """Send (engine, request) pairs; the futures are as those of `request`.

        An engine gets all of its requests in one write. It would start on the first of them meanwhile, and on few
        cores leave the sender none to send the rest. `on_piece` is called with every `Piece` before the reply, on the
        thread that takes the engine's replies.
        """
        frames: dict[int, list[bytes]] = {}
        futures: list[Future[Reply]] = []
        payloads = [(engine, msgspec.msgpack.encode(request)) for engine, request in requests]
        for engine, payload in payloads:
            future: Future[Reply] = Future()
            if request_id := self._register(_PendingRequest(engine, future, on_piece)):
                frames.setdefault(engine, []).append(frame(request_id, payload))
            futures.append(future)
        for engine, engine_frames in frames.items():
            # By the caller's own thread, which need not wait for another to wake up.
            self._connections[engine].send(b"".join(engine_frames))
        return futures

    def request_each(self, request: Request, *, deadline: Deadline | None = None) -> list[Reply]:
        """Send one request to every engine and return the replies, by engine. Raises as `collect`."""
        return collect({engine: self.request(engine, request) for engine in range(self.engines)}, deadline=deadline)

    def close(self) -> None:
        """End the connections and fail the requests in flight. The engines go on. Idempotent."""
        with self._lock:
            self._closed.set()
        self._lose_all("the pool was closed")
        for thread in self._threads:
            thread.join()

    def _register(self, pending: _PendingRequest) -> bytes | None:
        """Return the id under which the reply will come; None if the engine is lost, which fails the future."""
        with self._lock:
            if self._closed.is_set():
                raise EngineError("the pool is closed: generate and sync inside `with join(...)`")
            if pending.engine not in self._lost:
                request_id = next(self._ids).to_bytes(ID_BYTES, "big")
                self._pending[request_id] = pending
                return request_id
        pending.future.set_exception(EngineError(failures=[self._lost[pending.engine]]))
        return None

    def _start_thread(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name="rollcast-pool", daemon=True)
        thread.start()
        return thread

    def _listen(self, engine: int) -> None:
        """Take an engine's replies until it ends; `_watch` reads the reason from the registry."""
        try:
            self._take_replies(engine)
        except Exception as error:
            # This engine's replies cannot be read from here on.
            self._lose(Failure(text=f"a reply cannot be decoded: {error}", engine=engine), engine=engine)

    def _take_replies(self, engine: int) -> None:
        decoder = msgspec.msgpack.Decoder(Reply)
        for message in self._connections[engine].messages():
            reply = decoder.decode(message[ID_BYTES:])
            with self._lock:
                pending = self._pending.get(message[:ID_BYTES])
                if not isinstance(reply, Piece):
                    self._pending.pop(message[:ID_BYTES], None)
            if pending is not None:
                _deliver(reply, pending)

    def _watch(self) -> None:
        """Fail the requests of engines that are lost, and all requests when the job is over."""
        while not self._closed.wait(WATCH_S):
            try:
                lost, done = self._registry.lost(), self._registry.done()
            except Exception as error:
                self._lose_all(f"the job's store is gone: {error}")
                return
            for engine, failure in lost.items():
                self._lose(failure, engine=engine)
            if done:
                self._lose_all("the job is over: a trainer has left it")

    def _lose_all(self, text: str) -> None:
        for engine in range(self.engines):
            self._lose(Failure(text=text), engine=engine)

    def _lose(self, failure: Failure, *, engine: int) -> None:
        """Fail all requests to an engine, now and later."""
        with self._lock:
            failure = self._lost.setdefault(engine, failure)
            ids = [request_id for request_id, pending in self._pending.items() if pending.engine == engine]
            futures = [self._pending.pop(request_id).future for request_id in ids]
        for future in futures:
            future.set_exception(EngineError(failures=[failure]))
        # A thread that is sending to it must not wait for it.
        self._connections[engine].close()


def _deliver(reply: Reply, pending: _PendingRequest) -> None:
    if isinstance(reply, Piece):
        assert pending.on_piece is not None
        # The thread that takes all replies must survive a caller's mistake.
        try:
            pending.on_piece(reply)
        except Exception:
            logger.exception("on_piece raised for a piece of a stream")
    elif isinstance(reply, Failed):
        pending.future.set_exception(EngineError(reply.message, failures=reply.failures))
    else:
        pending.future.set_result(reply)


def collect(
    pending: "Mapping[int, Future[Reply]]", *, deadline: Deadline | None = None, spin: bool = False
) -> list[Reply]:
    """Wait for replies, given by engine. Raises one `EngineError` with the failures of all engines.

    With `spin`, poll for the first milliseconds instead of sleeping, for replies so near that waking up would take
    as long.
    """
    start = time.perf_counter()
    futures = pending.values()
    while spin and not all(future.done() for future in futures) and time.perf_counter() - start < SPIN_S:
        poll_sleep(start, low_priority=False)
    replies: list[Reply] = []
    errors: list[EngineError] = []
    for engine, future in pending.items():
        try:
            replies.append(future.result(deadline.left_s() if deadline else None))
        except EngineError as error:
            errors.append(error)
        except FutureTimeoutError:
            assert deadline is not None
            failure = Failure(text=f"no answer within {deadline.timeout_s:g} s", engine=engine)
            errors.append(EngineError(failures=[failure]))
    if errors:
        message = "\n".join(dict.fromkeys(map(str, errors)))
        raise EngineError(message, failures=[failure for error in errors for failure in error.failures])
    return replies
