"""Moves model weights from trainer ranks to rollout workers. Needs torch; knows nothing of vLLM."""

from rollcast.comm.adapter import open_source
from rollcast.comm.broadcaster import WeightBroadcaster
from rollcast.comm.buckets import Bucket, Message, Move
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group, host_store, join_group
from rollcast.comm.inbox import Landing, VerifyError
from rollcast.comm.params import Manifest, ParamSpec
from rollcast.comm.plan import Lane, TransferPlan, build_transfer, whole_moves
from rollcast.comm.receiver import WeightReceiver
from rollcast.comm.region import Region
from rollcast.comm.report import PhaseTimer, SyncReport
from rollcast.comm.source import WeightSource

__all__ = [
    "Bucket",
    "Deadline",
    "Group",
    "Landing",
    "Lane",
    "Manifest",
    "Message",
    "Move",
    "ParamSpec",
    "PhaseTimer",
    "Region",
    "SyncReport",
    "TransferPlan",
    "VerifyError",
    "WeightBroadcaster",
    "WeightReceiver",
    "WeightSource",
    "build_transfer",
    "host_store",
    "join_group",
    "open_source",
    "whole_moves",
]
