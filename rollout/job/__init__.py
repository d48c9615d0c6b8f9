"""Turn torchrun's ranks into trainers and engines: preflight, roles, the engine's supervisor (every rank)."""

from rollcast.rollout.job.job import Job, join
from rollcast.rollout.job.preflight import versions
from rollcast.rollout.job.world import World

__all__ = ["Job", "World", "join", "versions"]
