"""The worker of the pool's engine in `pool_overhead.py` (every vLLM worker process, as `worker_extension_cls`)."""

from latency_facts import FactsWorker

from rollcast.rollout.worker.extension import RollcastWorker


class PoolWorker(FactsWorker, RollcastWorker):
    """What every engine of a pool has, and its settings."""
