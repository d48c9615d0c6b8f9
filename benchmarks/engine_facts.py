"""Settings that vLLM chooses itself and that decide its speed (vLLM worker process, as `worker_extension_cls`)."""

from typing import Any


class FactsWorker:
    """Adds one method to vLLM's worker. Also for engines without rollcast."""

    def bench_facts(self) -> dict[str, Any]:
        """Return the engine's settings, and how many tokens its KV cache holds."""
        worker: Any = self
        config = worker.vllm_config
        return {
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "cuda_graphs": str(config.compilation_config.cudagraph_mode),
            "dtype": str(config.model_config.dtype),
            "kv_cache_tokens": (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
        }
