"""Holding vLLM's scheduler and clearing its caches (engine process; the one place that knows these hooks)."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

# Rounds of the event loop that an output takes from vLLM's queue to the request that waits for it.
ROUNDS = 8


class Scheduling:
    """Pauses one `AsyncLLM`, between two of its steps.

    `AsyncLLM.pause_generation` does the same and then sleeps for 20 ms, as long as a sync of a small model.
    """

    def __init__(self, llm: Any) -> None:
        self._core = llm.engine_core
        self._llm = llm

    async def pause(self, mode: str) -> None:
        """Schedule nothing more, and wait for the step under way. vLLM's modes: "keep", "wait", "abort"."""
        await self._core.pause_scheduler_async(mode=mode, clear_cache=False)

    async def pause_for(self, mode: str, act: Callable[[], Awaitable[Any]], *, timeout_s: float) -> Any:
        """Pause and then act, such as by `collective_rpc`; stay paused. Returns what the act does.

        With "keep" the act's call is on its way before the pause is over: vLLM takes both between the same two
        steps, and the call's GPU work is queued behind that of the step under way.
        """
        if mode == "keep":
            _, outcome = await asyncio.gather(self.pause(mode), act())
            return outcome
        try:
            async with asyncio.timeout(timeout_s):
                await self.pause(mode)
        except TimeoutError:
            raise TimeoutError(f"did not pause within {timeout_s:.1f} s (pause_mode is {mode!r})") from None
        return await act()

    async def settle(self) -> None:
        """Let every output that vLLM made before the pause reach its request."""
        while not self._core.outputs_queue.empty():
            await asyncio.sleep(0)
        for _ in range(ROUNDS):
            await asyncio.sleep(0)

    async def resume(self) -> None:
        """Schedule again."""
        await self._core.resume_scheduler_async()

    async def clear_prefix_cache(self) -> bool:
        """Whether the old weights' keys are gone. Requests that hold some are run again from their start."""
        # vLLM refuses while requests hold blocks, unless it may run those again.
        for reset_running_requests in (False, True):
            if await self._llm.reset_prefix_cache(reset_running_requests=reset_running_requests):
                return True
        return False
