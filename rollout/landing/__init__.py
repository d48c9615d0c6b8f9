"""Where each byte lands in vLLM: compile its loader into a plan, apply it (worker; trainer rank 0 reads the plan)."""

from rollcast.rollout.landing.plan import LandingPlan

__all__ = ["LandingPlan"]
