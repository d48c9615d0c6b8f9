"""The trainer's side of the engines: hands out prompts, updates, frees memory (every trainer rank has its own pool)."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from rollcast.rollout.errors import EngineError
from rollcast.rollout.pool.dispatcher import Dispatch
from rollcast.rollout.protocol.messages import (
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
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling

SLEEP_TAGS = frozenset({"weights", "kv_cache"})


class Pool(Dispatch):
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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int | None = None,
        request_ids: Sequence[str] | None = None,
        priority: int = 0,
    ) -> list[list[Completion]]:
        """Sample `n` completions (None: `sampling.n`) of each prompt; prompts are token ids. Not collective.

        Blocks until all are done. Requests with a lower `priority` run first; `request_ids` are names to `abort` by,
        one for each prompt. Raises `ValueError` for a prompt that does not fit the engines, `EngineError` when an
        engine refuses or dies.
        """
        ids = self.new_ids(len(prompts)) if request_ids is None else request_ids
        if len(ids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many request_ids, got {len(ids)}")
        started = self.start(prompts, _times(sampling, n), ids, priority=priority)
        try:
            return [future.result() for future in started]
        except BaseException:
            # Nobody will take what the others make.
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
        """As `generate`, for one prompt, without waiting. `asyncio.wrap_future` makes it awaitable.

        A future that is cancelled aborts the request.
        """
        ids = [request_id] if request_id else self.new_ids(1)
        (future,) = self.start([prompt], _times(sampling, n), ids, priority=priority)
        return future

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
        ids = [request_id] if request_id else self.new_ids(1)

        def put(piece: Piece | None) -> None:
            # A stream can be left behind by a loop that is closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        (future,) = self.start([prompt], sampling, ids, priority=priority, on_piece=put)
        future.add_done_callback(lambda _: put(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            if not future.done():
                with contextlib.suppress(EngineError):
                    self.abort(ids)

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


def _times(sampling: Sampling, n: int | None) -> Sampling:
    """With `n` samples of each prompt; None: as it is."""
    return sampling if n is None else msgspec.structs.replace(sampling, n=n)
