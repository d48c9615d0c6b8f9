"""Move bytes between ranks: one `Group` interface over NCCL, CUDA IPC and gloo (both sides)."""

from rollcast.comm.transport.base import Group, PersistentTensors, TensorError, Work
from rollcast.comm.transport.lane_groups import LaneGroups
from rollcast.comm.transport.rendezvous import host_store, join_group

__all__ = ["Group", "LaneGroups", "PersistentTensors", "TensorError", "Work", "host_store", "join_group"]
