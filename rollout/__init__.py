"""A pool of vLLM engines that trainer ranks generate with and push weights to."""

from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.errors import EngineError, Failure, OrchestratorError, PreflightError, RollcastError, SyncError
from rollcast.rollout.job import Job, join
from rollcast.rollout.orchestrator import Mode, Orchestrator, Outcome, async_, on_policy, one_step_off
from rollcast.rollout.pool import Pool
from rollcast.rollout.protocol.sampling import Completion, Sampling
from rollcast.rollout.sync import PoolBroadcaster

__all__ = [
    "Completion",
    "EngineError",
    "Failure",
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
