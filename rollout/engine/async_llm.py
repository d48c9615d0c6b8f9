"""Holding vLLM's scheduler, its caches and its memory (engine process; the one place that knows these hooks)."""

import asyncio
from typing import Any

from rollcast.rollout.lora import lora_args
from rollcast.rollout.protocol.messages import Launch


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


def start_llm(launch: Launch) -> Any:
    """An `AsyncLLM` with its processes, its model loaded. Blocks until it is ready."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    optional: dict[str, Any] = {} if launch.max_num_seqs is None else {"max_num_seqs": launch.max_num_seqs}
    if launch.deterministic:
        # Which keys it holds hangs on what came before, in which order.
        optional["enable_prefix_caching"] = False
    if launch.lora_rank is not None:
        optional |= lora_args(launch.lora_rank, versions=launch.lora_versions)
    args: dict[str, Any] = {
        "model": launch.model,
        "dtype": launch.dtype,
        "max_model_len": launch.max_model_len,
        "tensor_parallel_size": launch.tensor_parallel_size,
        "worker_extension_cls": launch.worker_extension_cls,
        "load_format": launch.load_format,
        "seed": launch.seed,
        "enforce_eager": launch.enforce_eager,
        "gpu_memory_utilization": launch.gpu_memory_utilization,
        # The pool's prompts arrive as tokens; vLLM then knows no end-of-sequence token. Its own server takes text.
        "skip_tokenizer_init": launch.openai_port is None,
        # The policy ratio needs the distribution that was sampled from.
        "logprobs_mode": "processed_logprobs",
        # As first come, first served, where nobody asks for priorities.
        "scheduling_policy": "priority",
        "disable_log_stats": True,
    }
    engine_args = AsyncEngineArgs(**args | optional | launch.engine_args)
    # As many requests at a time, and tokens in a step, as vLLM's `LLM` takes: left alone, an `AsyncLLM` takes an
    # eighth of both on an H200.
    llm = AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)
    _share_the_loop(llm)
    return llm


def _share_the_loop(llm: Any) -> None:
    """Let others have their turn between two steps' outputs.

    vLLM's handler of outputs only waits when there are none. Where steps are short, or the core is shared, there
    always are, and a sync would wait until the last request is done.
    """
    core = llm.engine_core
    get = core.get_output_async

    async def get_output_async() -> Any:
        outputs = await get()
        await asyncio.sleep(0)
        return outputs

    core.get_output_async = get_output_async
