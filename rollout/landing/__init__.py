"""Where each byte lands in vLLM: its loader is compiled into a plan, which every sync applies.

Runs in vLLM's workers; trainers read plans. Importing the package loads no vLLM.
"""

from rollcast.rollout.landing.plan import LandingPlan

__all__ = ["LandingPlan"]
