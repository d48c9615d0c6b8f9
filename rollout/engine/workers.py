"""Calls to all workers of one engine (engine process)."""

from collections.abc import Iterable
from typing import Any

import msgspec

from rollcast.rollout.errors import EngineError, Failure
from rollcast.rollout.protocol.messages import ReceiveResult
from rollcast.rollout.protocol.worker_channel import CallOutcome, WorkerChannel, WorkerError


class Workers:
    """The workers of one `AsyncLLM`. Errors have one `Failure` for each worker that failed, with its own text."""

    def __init__(self, llm: Any, *, index: int, count: int, slots: int) -> None:
        self._llm = llm
        self._index = index
        self._count = count
        self._slots = slots
        self._channel = WorkerChannel(count)

    async def connect(self) -> None:
        """Make the workers count tokens and connect to the side channel. Called before the first request."""
        await self.call("rollcast_connect", await self._channel.open(), self._count, self._slots, phase="start")

    async def call(self, method: str, *args: Any, phase: str) -> list[Any]:
        """Call a method of every worker's extension, through vLLM. Return the results in the order of ranks.

        Raises `EngineError` if any worker fails; `phase` is that of its failures.
        """
        try:
            replies = await self._llm.collective_rpc("rollcast_call", args=(method, args, phase))
        except Exception as error:
            raise self._error([Failure(text=str(error) or type(error).__name__, phase=phase)]) from error
        outcomes = [msgspec.msgpack.decode(reply, type=CallOutcome) for reply in replies]
        if failures := [outcome.failure for outcome in outcomes if outcome.failure is not None]:
            raise self._error(failures)
        return [outcome.result for outcome in outcomes]

    async def call_directly(
        self, method: str, *, phase: str, timeout_s: float, **arguments: Any
    ) -> list[ReceiveResult]:
        """Call a method of every worker's `WorkerSync` at once, whatever vLLM is doing; else as `call`."""
        try:
            results = await self._channel.call(method, phase=phase, timeout_s=timeout_s, **arguments)
        except WorkerError as error:
            raise self._error(error.failures) from None
        return msgspec.convert(results, list[ReceiveResult])

    def _error(self, failures: Iterable[Failure]) -> EngineError:
        failures = [msgspec.structs.replace(failure, engine=self._index) for failure in failures]
        texts = {failure.text for failure in failures}
        # What all workers report alike is shown once.
        message = f"engine {self._index}: {texts.pop()}" if len(texts) == 1 and len(failures) == self._count else ""
        return EngineError(message, failures=failures)
