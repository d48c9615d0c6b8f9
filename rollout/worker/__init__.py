"""rollcast inside a vLLM worker process."""

from rollcast.rollout.worker.extension import RollcastWorker

__all__ = ["RollcastWorker"]
