"""How vLLM is started: what the leader tells the engine process, and what that makes of it."""

import asyncio
from typing import Any

import msgspec

from rollcast.rollout.lora import lora_args


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is told when it starts (JSON on its standard input)."""

    engine: int
    host: str
    """Address to bind the service to."""
    device: str
    dtype: str
    model: str
    max_model_len: int
    tensor_parallel_size: int
    worker_extension_cls: str
    load_format: str
    seed: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion unless `Sampling.ignore_eos`."""
    enforce_eager: bool
    gpu_memory_utilization: float
    max_num_seqs: int | None
    sync_asleep: str
    deterministic: bool
    openai_port: int | None
    openai_flags: tuple[str, ...]
    lora_rank: int | None
    lora_versions: int
    engine_args: dict[str, Any]


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
