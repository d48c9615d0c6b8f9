"""A pool of vLLM engines that trainer ranks generate with and push weights to."""

from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.errors import EngineError, OrchestratorError, PreflightError, RollcastError, SyncError
from rollcast.rollout.job.job import Job, join
from rollcast.rollout.orchestrator.orchestrator import Orchestrator, Outcome
from rollcast.rollout.orchestrator.schedule import Mode, async_, on_policy, one_step_off
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.protocol.sampling import Completion, Sampling
from rollcast.rollout.sync.broadcaster import PoolBroadcaster

__all__ = [
    "Completion",
    "EngineError",
    "Job",
    "Mode",
    "Orchestrator",
    "OrchestratorError",
    "Outcome",
    "Pool",
    "PoolBroadcaster",
    "PreflightError",
    "RollcastError",
    "RolloutConfig",
    "Sampling",
    "SyncError",
    "async_",
    "join",
    "on_policy",
    "one_step_off",
]
