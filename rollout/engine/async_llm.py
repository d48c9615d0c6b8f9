"""vLLM's `AsyncLLM`: how it is built, paused and put to sleep (engine process)."""

import asyncio
import os
from typing import Any

from rollcast.rollout.config import START_METHOD_VARIABLE, RolloutConfig
from rollcast.rollout.lora import lora_args
from rollcast.rollout.protocol.messages import SLEEP_TAGS


class LLMControl:
    """Pauses the scheduler of one `AsyncLLM` between two of its steps, clears its caches, frees its memory.

    `AsyncLLM.pause_generation` pauses, too, and then sleeps for 20 ms: as long as a sync of a small model takes.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._core = llm.engine_core
        self.paused = False
        self.asleep: frozenset[str] = frozenset()
        """What has freed its memory: some of `SLEEP_TAGS`."""

    async def pause(self, mode: str, *, timeout_s: float) -> None:
        """Stop scheduling, in vLLM's mode "keep" or "wait". Raises `TimeoutError`, with the mode in its text."""
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
        """Empty the prefix cache; requests that hold blocks of it start over. Return whether vLLM did so."""
        # vLLM refuses while requests hold blocks, unless it may preempt them.
        for reset_running_requests in (False, True):
            if await self._llm.reset_prefix_cache(reset_running_requests=reset_running_requests):
                return True
        return False

    def mark_asleep(self) -> None:
        """Count weights and KV cache as freed, before `sleep` frees them."""
        self.asleep = SLEEP_TAGS

    async def sleep(self, level: int) -> None:
        """Free memory, by vLLM's sleep levels."""
        self.mark_asleep()
        await self._llm.sleep(level=level)

    async def wake_up(self, tags: list[str]) -> None:
        """Allocate the memory of `tags` again; all of it when `tags` is empty."""
        await self._llm.wake_up(tags=tags or None)
        self.asleep = self.asleep - set(tags) if tags else frozenset()


def build_async_llm(config: RolloutConfig) -> Any:
    """Return an `AsyncLLM` with its processes started and its model loaded. Blocks until then."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    optional: dict[str, Any] = {} if config.max_num_seqs is None else {"max_num_seqs": config.max_num_seqs}
    if config.deterministic:
        # What the cache holds depends on the earlier requests and their order.
        optional["enable_prefix_caching"] = False
    if config.lora_rank is not None:
        optional |= lora_args(config.lora_rank, versions=config.lora_versions)
    args: dict[str, Any] = {
        "model": config.model,
        "dtype": config.resolved_dtype(),
        "max_model_len": config.resolved_max_model_len(),
        "tensor_parallel_size": config.tensor_parallel_size,
        "worker_extension_cls": config.worker_extension_cls,
        "load_format": config.load_format,
        "seed": config.seed,
        "enforce_eager": config.enforce_eager,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        # The pool's prompts are tokens; vLLM then knows no end-of-sequence token. Its own server takes text, and its
        # processors of images and sound want a tokenizer.
        "skip_tokenizer_init": config.openai_port is None and not config.has_towers(),
        # The policy ratio needs the distribution that was sampled from.
        "logprobs_mode": "processed_logprobs",
        # Equal priorities run first come, first served.
        "scheduling_policy": "priority",
        "disable_log_stats": True,
    }
    engine_args = AsyncEngineArgs(**args | optional | dict(config.engine_args))
    start_method = os.environ.get(START_METHOD_VARIABLE)
    # The defaults of vLLM's `LLM` for sequences and tokens in a step: those of an `AsyncLLM` are an eighth of
    # them on an H200.
    vllm_config = engine_args.create_engine_config(UsageContext.LLM_CLASS)
    if start_method is not None:
        # vLLM's platform for CPUs has set "spawn".
        os.environ[START_METHOD_VARIABLE] = start_method
    llm = AsyncLLM.from_vllm_config(
        vllm_config,
        usage_context=UsageContext.LLM_CLASS,
        enable_log_requests=engine_args.enable_log_requests,
        disable_log_stats=engine_args.disable_log_stats,
    )
    _yield_between_outputs(llm)
    return llm


def _yield_between_outputs(llm: Any) -> None:
    """Let other tasks of the event loop run between the outputs of two steps.

    vLLM's output handler waits only when there are no outputs. Where steps are short, or the core is shared, there
    always are some, and a sync would wait until the last request is done.
    """
    core = llm.engine_core
    get = core.get_output_async

    async def get_output_async() -> Any:
        outputs = await get()
        await asyncio.sleep(0)
        return outputs

    core.get_output_async = get_output_async
