"""Move model weights from trainer ranks to rollout workers (both sides). Needs torch; imports no vLLM."""

from rollcast.comm.deadline import Deadline
from rollcast.comm.plan.buckets import Bucket, Message, Move, fill_buckets
from rollcast.comm.plan.manifest import Manifest, ParamSpec
from rollcast.comm.plan.region import Region
from rollcast.comm.plan.transfer import Lane, TransferPlan, build_transfer
from rollcast.comm.report import PhaseTimer, SyncReport
from rollcast.comm.transfer.broadcaster import WeightBroadcaster
from rollcast.comm.transfer.landing import Landing, VerifyError
from rollcast.comm.transfer.lora_source import open_source
from rollcast.comm.transfer.receiver import WeightReceiver
from rollcast.comm.transfer.source import WeightSource
from rollcast.comm.transport import Group, host_store, join_group

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
    "fill_buckets",
    "host_store",
    "join_group",
    "open_source",
]
