"""Worker of the pool's engine in `pool_overhead.py` (vLLM worker process, as `worker_extension_cls`).

Not in `pool_llm.py`, whose processes do without rollcast.
"""

from engine_facts import FactsWorker

from rollcast.rollout.worker import RollcastWorker


class PoolWorker(FactsWorker, RollcastWorker):
    """Reports the engine's settings, which must be those of vLLM's own `LLM`."""
