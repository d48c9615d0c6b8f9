"""The trainer's side of the engines: hands out prompts, carries requests (every trainer rank has its own pool)."""

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from rollcast.comm import Deadline
from rollcast.rollout.errors import EngineError
from rollcast.rollout.frames import ID_BYTES
from rollcast.rollout.preflight import check_prompts
from rollcast.rollout.records import (
    Call,
    Called,
    Completion,
    Describe,
    Description,
    Failed,
    Fingerprint,
    Fingerprints,
    Generate,
    Generated,
    Reply,
    Request,
    Sampling,
    Sleep,
    WakeUp,
)
from rollcast.rollout.replies import collect, expect, named
from rollcast.rollout.roster import Roster

WATCH_S = 0.25
SLEEP_TAGS = frozenset({"weights", "kv_cache"})


class Pool:
    """Engines that generate.

        groups = pool.generate(prompts, Sampling(max_tokens=64, n=8))
        groups[i][j].token_ids          # the j-th completion of prompts[i]

    Calls may come from any thread of any trainer rank, at the same time.
    """

    def __init__(self, roster: Roster, addresses: Sequence[str], *, max_model_len: int) -> None:
        self._roster = roster
        self._max_model_len = max_model_len
        self._ids = itertools.count()
        self._replies: dict[bytes, tuple[int, Future[Reply]]] = {}
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lines = [_Line(address) for address in addresses]
        self._threads = [self._thread(self._listen, line) for line in self._lines]
        self._threads.append(self._thread(self._watch))

    @property
    def engines(self) -> int:
        """Number of engines."""
        return self._roster.engines

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt; prompts are token ids. Not collective.

        Blocks until all are done. Raises `ValueError` for a prompt that does not fit the engines, `EngineError`
        when an engine refuses or dies.
        """
        check_prompts(prompts, max_model_len=self._max_model_len)
        shares = [range(engine, len(prompts), self.engines) for engine in range(self.engines)]
        futures = {
            engine: self.request(engine, Generate([list(prompts[i]) for i in share], sampling))
            for engine, share in enumerate(shares)
            if share
        }
        groups: list[list[Completion]] = [[] for _ in prompts]
        for engine, future in futures.items():
            reply = expect(future.result(), Generated)
            for index, group in zip(shares[engine], reply.groups, strict=True):
                groups[index] = group
        return groups

    def sleep(self, level: int = 1) -> None:
        """Let every engine free its GPU memory: level 1 keeps the weights on the host, 2 drops them. Not collective.

        Ends requests in flight. Needs `engine_args={"enable_sleep_mode": True}` on GPUs. After level 2, wake the
        weights and sync before you generate.
        """
        self.ask_all(Sleep(level))

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Let every engine take memory back: "weights", "kv_cache", or all by default. Not collective.

        To save memory, wake "weights", sync, and wake "kv_cache" when the trainer's memory is free.
        """
        if unknown := set(tags) - SLEEP_TAGS:
            raise ValueError(f"unknown tag {unknown.pop()!r}, expected some of {', '.join(sorted(SLEEP_TAGS))}")
        self.ask_all(WakeUp(list(tags)))

    def describe(self) -> list[Description]:
        """Every engine's process, policy version and state."""
        return [expect(reply, Description) for reply in self.ask_all(Describe())]

    def fingerprints(self) -> list[list[dict[str, str]]]:
        """By engine and worker: SHA-256 of the bytes of every live parameter and buffer, by vLLM's name."""
        return [expect(reply, Fingerprints).workers for reply in self.ask_all(Fingerprint())]

    def call_workers(self, method: str, *args: Any) -> list[list[Any]]:
        """Call a method of your own `worker_extension_cls` on every worker: results by engine and worker.

        Arguments and results are plain values (numbers, strings, bytes, lists, dicts). Raises `EngineError` with
        the worker's text. It runs between two steps of the engine, which it holds up.
        """
        return [expect(reply, Called).results for reply in self.ask_all(Call(method, list(args)))]

    def request(self, engine: int, request: Request) -> "Future[Reply]":
        """Send a request to one engine. The future raises `EngineError` if the engine fails or dies."""
        future: Future[Reply] = Future()
        payload = msgspec.msgpack.encode(request)
        with self._lock:
            if self._closed.is_set():
                raise EngineError("the pool is closed: generate and sync inside `with join(...)`")
            if engine in self._lost:
                future.set_exception(EngineError(self._lost[engine]))
                return future
            request_id = next(self._ids).to_bytes(ID_BYTES, "big")
            self._replies[request_id] = engine, future
        # By the caller's own thread, which need not wait for another to wake up.
        self._lines[engine].send(request_id + payload)
        return future

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

    def _thread(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name="rollcast-pool", daemon=True)
        thread.start()
        return thread

    def _listen(self, line: "_Line") -> None:
        """Take an engine's replies until it ends, which `_watch` hears of, with the reason."""
        decoder = msgspec.msgpack.Decoder(Reply)
        for message in line.messages():
            with self._lock:
                engine, future = self._replies.pop(message[:ID_BYTES], (0, None))
            if future is None:
                continue
            reply = decoder.decode(message[ID_BYTES:])
            if isinstance(reply, Failed):
                future.set_exception(EngineError(named(engine, reply.text)))
            else:
                future.set_result(reply)

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
            ids = [request_id for request_id, (owner, _) in self._replies.items() if owner == engine]
            futures = [self._replies.pop(request_id)[1] for request_id in ids]
        for future in futures:
            future.set_exception(EngineError(text))
        # Who is about to send to it must not wait for it.
        self._lines[engine].close()


class _Line:
    """A connection to an engine's service."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._socket = socket.create_connection((host, int(port)))
        except OSError as error:
            raise OSError(f"the engine at {address} cannot be reached: {error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A descriptor of its own: the socket stays ours, to be shut down from any thread.
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send it, unless the engine has ended."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(message)

    def messages(self) -> Iterator[bytes]:
        """What comes, until the connection ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self._connection.recv_bytes()

    def close(self) -> None:
        """End it, from any thread. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
