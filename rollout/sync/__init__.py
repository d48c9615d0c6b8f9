"""The trainer's side of a sync: lanes, attempts, reports (trainer ranks)."""

from rollcast.rollout.sync.broadcaster import PoolBroadcaster, refuse_first_sync

__all__ = ["PoolBroadcaster", "refuse_first_sync"]
