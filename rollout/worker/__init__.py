"""rollcast inside a vLLM worker process; importing it chooses vLLM's CPU weight layout, before the model loads."""

from rollcast.rollout.worker.extension import RollcastWorker
from rollcast.rollout.worker.sync import WorkerSync

__all__ = ["RollcastWorker", "WorkerSync"]
