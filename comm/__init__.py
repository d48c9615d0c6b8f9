"""Moves model weights from trainer ranks to rollout workers. Needs torch; knows nothing of vLLM."""

from rollcast.comm.broadcaster import WeightBroadcaster
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group, host_store, join_group
from rollcast.comm.params import Manifest, ParamSpec, WeightSource
from rollcast.comm.plan import Bucket, BucketPlan, Slot, build_plan
from rollcast.comm.receiver import WeightReceiver
from rollcast.comm.region import Region
from rollcast.comm.report import PhaseTimer, SyncReport

__all__ = [
    "Bucket",
    "BucketPlan",
    "Deadline",
    "Group",
    "Manifest",
    "ParamSpec",
    "PhaseTimer",
    "Region",
    "Slot",
    "SyncReport",
    "WeightBroadcaster",
    "WeightReceiver",
    "WeightSource",
    "build_plan",
    "host_store",
    "join_group",
]
