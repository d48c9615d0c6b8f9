"""rollcast inside a vLLM worker process (worker)."""

from rollcast.rollout.worker.extension import RollcastWorker
from rollcast.rollout.worker.sync import WorkerSync

__all__ = ["RollcastWorker", "WorkerSync"]
