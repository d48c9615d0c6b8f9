"""Calls to all workers of one engine (engine process)."""

from collections.abc import Iterable
from typing import Any

import msgspec

from rollcast.rollout.errors import EngineError, Failure
from rollcast.rollout.protocol.worker_channel import WorkerChannel, WorkerError


class Workers:
    """The workers of one `AsyncLLM`. Errors have one `Failure` for each worker that failed, with its own text."""

    def __init__(self, llm: Any, *, index: int, count: int, slots: int) -> None:
        self._llm = llm
        self._index = index
        self._count = count
        self._slots = slots
        self._channel = WorkerChannel(count)

    async def watch(self) -> None:
        """Make the workers count tokens and connect to the side channel. Called before the first request."""
        await self.call("rollcast_watch", await self._channel.open(), self._count, self._slots)

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker's extension, through vLLM. Raises `EngineError` if any worker fails."""
        try:
            outcomes = await self._llm.collective_rpc("rollcast_call", args=(method, args))
        except Exception as error:
            raise self._error([Failure(text=str(error) or type(error).__name__)]) from error
        if failures := [msgspec.convert(failure, Failure) for failure, _ in outcomes if failure is not None]:
            raise self._error(failures)
        return [result for _, result in outcomes]

    async def call_directly(self, method: str, *, timeout_s: float, **arguments: Any) -> list[Any]:
        """Call a method of every worker's `WorkerSync` at once, whatever vLLM is doing; else as `call`."""
        try:
            return await self._channel.call(method, timeout_s=timeout_s, **arguments)
        except WorkerError as error:
            raise self._error(error.failures) from None

    def _error(self, failures: Iterable[Failure]) -> EngineError:
        failures = [msgspec.structs.replace(failure, engine=self._index) for failure in failures]
        texts = {failure.text for failure in failures}
        # What all workers report alike is shown once.
        message = f"engine {self._index}: {texts.pop()}" if len(texts) == 1 and len(failures) == self._count else ""
        return EngineError(message, failures=failures)
