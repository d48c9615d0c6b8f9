"""Calls to all workers of one engine (engine process)."""

import re
from typing import Any

from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import named
from rollcast.rollout.protocol.worker_channel import Bells

# What vLLM wraps around a worker's own text.
VLLM_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (Worker failed with error )?|, please check the stack trace above for the root cause$"
)


class Workers:
    """The workers of one `AsyncLLM`. Errors carry a worker's own words."""

    def __init__(self, llm: Any, *, index: int, count: int, slots: int) -> None:
        self._llm = llm
        self._index = index
        self._count = count
        self._slots = slots
        self._bells = Bells(count)

    async def watch(self) -> None:
        """Let the workers count tokens, and answer their bells, from the first request on."""
        await self.call("rollcast_watch", await self._bells.open(), self._count, self._slots)

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; `EngineError` with the workers' own text if any raises."""
        try:
            outcomes = await self._llm.collective_rpc("rollcast_call", args=(method, args))
        except Exception as error:
            raise EngineError(named(self._index, VLLM_WRAPPING.sub("", str(error)))) from error
        if texts := [text for text, _ in outcomes if text is not None]:
            raise EngineError(named(self._index, "; ".join(dict.fromkeys(texts))))
        return [result for _, result in outcomes]

    async def ring(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker at once, whatever vLLM is doing; else as `call`."""
        try:
            return await self._bells.ring(method, *args)
        except RuntimeError as problem:
            raise EngineError(named(self._index, str(problem))) from None
