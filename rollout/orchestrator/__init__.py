"""When to generate, train and sync: a table of decisions, and the orchestrator that runs it (trainer ranks)."""

from rollcast.rollout.orchestrator.orchestrator import Orchestrator, Outcome
from rollcast.rollout.orchestrator.schedule import Mode, async_, on_policy, one_step_off

__all__ = ["Mode", "Orchestrator", "Outcome", "async_", "on_policy", "one_step_off"]
