"""The pool of engines that a trainer generates with (every trainer rank has its own)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from rollcast.comm import Deadline
from rollcast.rollout.errors import EngineError
from rollcast.rollout.pool.client import EngineClient
from rollcast.rollout.pool.dispatcher import DeterministicRequests, Dispatcher
from rollcast.rollout.pool.metrics import Metrics
from rollcast.rollout.protocol.messages import (
    SLEEP_TAGS,
    Call,
    Called,
    Describe,
    Description,
    Fingerprint,
    Fingerprints,
    Sleep,
    WakeUp,
    expect,
)
from rollcast.rollout.protocol.registry import EngineRegistry
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling


class Pool:
    """Engines that generate.

        groups = pool.generate(prompts, Sampling(max_tokens=64, n=8))
        groups[i][j].token_ids                                  # the j-th completion of prompts[i]
        future = pool.submit(prompt, sampling, priority=-1)     # one prompt, without waiting
        async for piece in pool.stream(prompt, sampling): ...   # its tokens as they are sampled
        pool.abort()                                            # all end with the tokens they have

    Calls may come from any thread of any trainer rank, at the same time; none is collective. All samples of a prompt
    are made by one engine: the least loaded one, or one that has computed the prompt's beginning, so that a
    conversation goes on where its keys and values are cached.
    """

    def __init__(
        self,
        registry: EngineRegistry,
        addresses: Sequence[str],
        *,
        max_model_len: int,
        rank: int = 0,
        deterministic: DeterministicRequests | None = None,
    ) -> None:
        # Public for syncs, which send requests of their own to the engines.
        self.client = EngineClient(registry, addresses)
        self.metrics = Metrics()
        self._dispatcher = Dispatcher(
            self.client, max_model_len=max_model_len, rank=rank, metrics=self.metrics, deterministic=deterministic
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int | None = None,
        request_ids: Sequence[str] | None = None,
        priority: int = 0,
    ) -> list[list[Completion]]:
        """Sample `n` completions (None: `sampling.n`) of each prompt; prompts are token ids.

        Blocks until all are done. Requests with a lower `priority` run first; `request_ids` are ids to `abort` by,
        one for each prompt. Raises `ValueError` for a prompt that does not fit the engines, `EngineError` when an
        engine refuses or dies.
        """
        ids = self._dispatcher.new_ids(len(prompts)) if request_ids is None else request_ids
        if len(ids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many request_ids, got {len(ids)}")
        futures = self._dispatcher.start(prompts, _with_n(sampling, n), ids, priority=priority)
        try:
            return [future.result() for future in futures]
        except BaseException:
            # Nobody will take the completions of the others.
            with contextlib.suppress(EngineError):
                self.abort(ids)
            raise

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        n: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> "Future[list[Completion]]":
        """Start to generate for one prompt and return the future. `asyncio.wrap_future` makes it awaitable.

        A future that is cancelled aborts the request. Raises as `generate`.
        """
        ids = [request_id] if request_id else self._dispatcher.new_ids(1)
        (future,) = self._dispatcher.start([prompt], _with_n(sampling, n), ids, priority=priority)
        return future

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, request_id: str | None = None, priority: int = 0
    ) -> AsyncGenerator[Piece, None]:
        """Yield the tokens of one completion as they are sampled, in any event loop.

        The last piece has a finish reason. A stream that is left early is aborted. Raises as `generate`, and
        `ValueError` if `sampling.n` is not 1.
        """
        if sampling.n != 1:
            raise ValueError(f"a stream has one completion: set n to 1, not {sampling.n}")
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        ids = [request_id] if request_id else self._dispatcher.new_ids(1)

        def put(piece: Piece | None) -> None:
            # The loop may have been closed while the stream was unfinished.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        (future,) = self._dispatcher.start([prompt], sampling, ids, priority=priority, on_piece=put)
        future.add_done_callback(lambda _: put(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            if not future.done():
                with contextlib.suppress(EngineError):
                    self.abort(ids)

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests of this pool, or all, with the tokens they have: finish reason "abort".

        Does not wait; whoever waits for the requests gets what they have. Ids that are unknown or finished are
        ignored.
        """
        self._dispatcher.abort(request_ids)

    def sleep(self, level: int = 1) -> None:
        """Let every engine free its GPU memory: level 1 keeps the weights on the host, level 2 drops them.

        Ends requests in flight. Needs `engine_args={"enable_sleep_mode": True}` on GPUs. After level 2, wake the
        weights and sync before you generate.
        """
        self.client.request_each(Sleep(level))

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Let every engine allocate memory again: "weights", "kv_cache", or both by default.

        To save memory, wake "weights", sync, and wake "kv_cache" when the trainer's memory is free. Raises
        `ValueError` for another tag.
        """
        if unknown := set(tags) - SLEEP_TAGS:
            raise ValueError(f"unknown tag {unknown.pop()!r}, expected some of {', '.join(sorted(SLEEP_TAGS))}")
        self.client.request_each(WakeUp(list(tags)))

    def describe(self) -> list[Description]:
        """Return every engine's process, policy version and state."""
        return [expect(reply, Description) for reply in self.client.request_each(Describe())]

    def fingerprints(self) -> list[list[dict[str, str]]]:
        """Return SHA-256 hashes of every live parameter and buffer, by engine, worker and vLLM's name."""
        return [expect(reply, Fingerprints).workers for reply in self.client.request_each(Fingerprint())]

    def call_workers(self, method: str, *args: Any, deadline: Deadline | None = None) -> list[list[Any]]:
        """Call a method of your own `worker_extension_cls` on every worker; return results by engine and worker.

        Arguments and results are plain values (numbers, strings, bytes, lists, dicts). The method runs between two
        steps of the engine, which wait for it. Raises `EngineError` with the worker's text, or naming the engines that
        have not answered by the deadline, if there is one.
        """
        replies = self.client.request_each(Call(method, list(args)), deadline=deadline)
        return [expect(reply, Called).results for reply in replies]

    def close(self) -> None:
        """End the connections to the engines; requests in flight fail. The engines go on. Idempotent."""
        self.client.close()


def _with_n(sampling: Sampling, n: int | None) -> Sampling:
    """Return the sampling with `n` samples of each prompt; None: unchanged."""
    return sampling if n is None else msgspec.structs.replace(sampling, n=n)
