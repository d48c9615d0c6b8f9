"""The trainer's side of the engines: hands out prompts, updates, frees memory (every trainer rank has its own pool)."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from rollcast.rollout.completions import plain_tokens
from rollcast.rollout.errors import EngineError
from rollcast.rollout.links import Links
from rollcast.rollout.metrics import Metrics
from rollcast.rollout.preflight import check_prompts
from rollcast.rollout.records import (
    Abort,
    Call,
    Called,
    Completion,
    Describe,
    Description,
    Fingerprint,
    Fingerprints,
    Generate,
    Generated,
    Piece,
    Reply,
    RunBatch,
    Sampling,
    Sleep,
    WakeUp,
)
from rollcast.rollout.repeatable import Batch, Repeatable
from rollcast.rollout.replies import expect
from rollcast.rollout.roster import Roster
from rollcast.rollout.routing import Router

SLEEP_TAGS = frozenset({"weights", "kv_cache"})


class Pool(Links):
    """Engines that generate.

        groups = pool.generate(prompts, Sampling(max_tokens=64, n=8))
        groups[i][j].token_ids                                  # the j-th completion of prompts[i]
        future = pool.submit(prompt, sampling, priority=-1)     # one prompt, without waiting
        async for piece in pool.stream(prompt, sampling): ...   # its tokens as they are made
        pool.abort()                                            # all end with what they have

    Calls may come from any thread of any trainer rank, at the same time. All samples of a prompt are made by one
    engine, the least loaded one, or one that has computed the prompt's beginning: a conversation goes on where its
    keys and values are cached.
    """

    def __init__(
        self,
        roster: Roster,
        addresses: Sequence[str],
        *,
        max_model_len: int,
        rank: int = 0,
        metrics: Metrics | None = None,
        repeatable: Repeatable | None = None,
    ) -> None:
        self._max_model_len = max_model_len
        self.metrics = metrics or Metrics()
        self._name = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._repeatable = repeatable
        self._router = Router(len(addresses), first=rank, in_turn=repeatable is not None)
        # By request id: the engine that it went to.
        self._owners: dict[str, int] = {}
        super().__init__(roster, addresses)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        request_ids: Sequence[str] | None = None,
        priority: int = 0,
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt; prompts are token ids. Not collective.

        Blocks until all are done. Requests with a lower `priority` run first; `request_ids` are names to `abort` by,
        one for each prompt. Raises `ValueError` for a prompt that does not fit the engines, `EngineError` when an
        engine refuses or dies.
        """
        check_prompts(prompts, max_model_len=self._max_model_len)
        ids = [self._new_id() for _ in prompts] if request_ids is None else request_ids
        if len(ids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many request_ids, got {len(ids)}")
        started: dict[str, Future[list[Completion]]] = {}
        try:
            with self._batch() as batch:
                for prompt, request_id in zip(prompts, ids, strict=True):
                    started[request_id] = self._start(prompt, sampling, request_id, priority=priority, batch=batch)
            return [future.result() for future in started.values()]
        except BaseException:
            # Nobody will take what the others make.
            with contextlib.suppress(EngineError):
                self.abort([*started])
            raise

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, *, request_id: str | None = None, priority: int = 0
    ) -> "Future[list[Completion]]":
        """As `generate`, for one prompt, without waiting. `asyncio.wrap_future` makes it awaitable.

        A future that is cancelled aborts the request.
        """
        with self._batch() as batch:
            return self._start(prompt, sampling, request_id or self._new_id(), priority=priority, batch=batch)

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, request_id: str | None = None, priority: int = 0
    ) -> AsyncGenerator[Piece, None]:
        """Yield the tokens of one completion as they are made, from any event loop. The last piece has a finish reason.

        A stream that is left early is aborted. Raises as `generate`, and `ValueError` if `sampling.n` is not 1.
        """
        if sampling.n != 1:
            raise ValueError(f"a stream has one completion: set n to 1, not {sampling.n}")
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        request_id = request_id or self._new_id()

        def put(piece: Piece | None) -> None:
            # A stream can be left behind by a loop that is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        with self._batch() as batch:
            future = self._start(prompt, sampling, request_id, priority=priority, batch=batch, on_piece=put)
        future.add_done_callback(lambda _: put(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            if not future.done():
                with contextlib.suppress(EngineError):
                    self.abort([request_id])

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests of this pool, or all, with what they have: finish reason "abort". Not collective.

        Does not wait: whoever waits for them gets them. Ids of requests that are over, or unknown, are passed over.
        """
        with self._lock:
            wanted = [*self._owners] if request_ids is None else request_ids
            owned = [(self._owners[each], each) for each in wanted if each in self._owners]
        for engine in {engine for engine, _ in owned}:
            self.request(engine, Abort([each for owner, each in owned if owner == engine]))

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

    def _start(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        request_id: str,
        *,
        priority: int,
        batch: Batch | None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> "Future[list[Completion]]":
        prompt = plain_tokens(prompt)
        check_prompts([prompt], max_model_len=self._max_model_len)
        if self._repeatable is not None:
            sampling = self._repeatable.seeded(sampling)
        tokens = sampling.n * sampling.max_tokens
        with self._lock:
            if request_id in self._owners:
                raise ValueError(f"request {request_id!r} is under way: give each an id of its own")
            engine = self._owners[request_id] = self._router.start(prompt, tokens=tokens)
            self.metrics.under_way(engine, 1, load=self._router.loads[engine])
        stream = on_piece is not None
        name = batch.joined_by(engine) if batch else ""
        request = Generate(
            request_id=request_id, prompt=prompt, sampling=sampling, priority=priority, stream=stream, batch=name
        )
        done: Future[list[Completion]] = Future()

        def end(reply: "Future[Reply]") -> None:
            error = reply.exception()
            group = [] if error else expect(reply.result(), Generated).group
            with self._lock:
                del self._owners[request_id]
                self._router.end(engine, prompt, tokens=tokens)
                self.metrics.under_way(engine, -1, load=self._router.loads[engine])
                if len(group) == 1:
                    # It may be a turn of a conversation.
                    self._router.hold([*prompt, *group[0].token_ids], engine)
            self.metrics.finished(engine, group)
            if not done.set_running_or_notify_cancel():
                return
            if error:
                done.set_exception(error)
            else:
                done.set_result(group)

        try:
            sent = self.request(engine, request, on_piece=on_piece)
        except Exception as error:
            sent = Future()
            sent.set_exception(error)
        sent.add_done_callback(end)
        done.add_done_callback(lambda its: self.abort([request_id]) if its.cancelled() else None)
        return done

    def _batch(self) -> "contextlib.AbstractContextManager[Batch | None]":
        if self._repeatable is None:
            return contextlib.nullcontext()
        return self._repeatable.batch(lambda engine, name: self.request(engine, RunBatch(name)))

    def _new_id(self) -> str:
        return f"{self._name}-{next(self._numbers)}"
