"""Trainer side of generation: prompts, routing, connections to engines (trainer ranks)."""

from rollcast.rollout.pool.pool import Pool

__all__ = ["Pool"]
