"""When to generate, train and sync: a table of decisions, and what drives it (trainer ranks)."""

from rollcast.rollout.orchestrator.modes import Mode, async_, on_policy, one_step_off
from rollcast.rollout.orchestrator.orchestrator import Orchestrator, Outcome

__all__ = ["Mode", "Orchestrator", "Outcome", "async_", "on_policy", "one_step_off"]
