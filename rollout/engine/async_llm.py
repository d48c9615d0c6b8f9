"""Holding vLLM's scheduler, its caches and its memory (engine process; the one place that knows these hooks)."""

import asyncio
from typing import Any


class Scheduling:
    """Pauses one `AsyncLLM`, between two of its steps.

    `AsyncLLM.pause_generation` does the same and then sleeps for 20 ms, as long as a sync of a small model.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._core = llm.engine_core
        self.paused = False
        self.asleep: frozenset[str] = frozenset()
        """What has given its memory back: "weights", "kv_cache"."""

    async def pause(self, mode: str, *, timeout_s: float) -> None:
        """Schedule nothing more. vLLM's modes: "keep", "wait". Raises `TimeoutError` with what to change."""
        self.paused = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._core.pause_scheduler_async(mode=mode, clear_cache=False)
        except TimeoutError:
            raise TimeoutError(f"did not pause within {timeout_s:.1f} s (pause_mode is {mode!r})") from None

    async def resume(self) -> None:
        """Schedule again, if paused."""
        if self.paused:
            self.paused = False
            await self._core.resume_scheduler_async()

    async def clear_prefix_cache(self) -> bool:
        """Whether the old weights' keys are gone. Requests that hold some are run again from their start."""
        # vLLM refuses while requests hold blocks, unless it may run those again.
        for reset_running_requests in (False, True):
            if await self._llm.reset_prefix_cache(reset_running_requests=reset_running_requests):
                return True
        return False

    def fall_asleep(self) -> None:
        """Note that `sleep` follows."""
        self.asleep = frozenset({"weights", "kv_cache"})

    async def sleep(self, level: int) -> None:
        """Give memory back, as vLLM's levels say."""
        self.fall_asleep()
        await self._llm.sleep(level=level)

    async def wake_up(self, tags: list[str]) -> None:
        """Take the memory of `tags` back; all of it when `tags` is empty."""
        await self._llm.wake_up(tags=tags or None)
        self.asleep = self.asleep - set(tags) if tags else frozenset()
