"""Trainer side of generation: prompts, routing, connections to engines (trainer ranks)."""

from rollcast.rollout.pool.dispatcher import check_prompts
from rollcast.rollout.pool.pool import Pool

__all__ = ["Pool", "check_prompts"]
