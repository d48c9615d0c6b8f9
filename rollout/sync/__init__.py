"""The trainer's side of a sync: lanes, attempts, reports (trainer ranks)."""

from rollcast.rollout.sync.broadcaster import PoolBroadcaster

__all__ = ["PoolBroadcaster"]
