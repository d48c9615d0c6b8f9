"""Trainer side of generation: prompts, routing, connections to engines (trainer ranks)."""

from rollcast.rollout.pool.dispatcher import check_prompts
from rollcast.rollout.pool.pool import Pool
from rollcast.rollout.pool.router import PrefixHolders

__all__ = ["Pool", "PrefixHolders", "check_prompts"]
