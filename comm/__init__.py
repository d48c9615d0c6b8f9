"""Move model weights from trainer ranks to rollout workers (both sides). Needs torch; imports no vLLM."""

from rollcast.comm.deadline import Deadline
from rollcast.comm.plan.box import Box
from rollcast.comm.plan.buckets import Bucket, Message, Move, fill_buckets
from rollcast.comm.plan.holders import Boxes, HeldParam, Holders, Overlap, statement_from_text, statement_to_text
from rollcast.comm.plan.kept import Kept
from rollcast.comm.plan.manifest import Manifest, ParamSpec
from rollcast.comm.plan.region import Region
from rollcast.comm.plan.transfer import Lane, TransferPlan, build_transfer, digest_of
from rollcast.comm.report import PhaseTimer, SyncReport
from rollcast.comm.transfer.broadcaster import WeightBroadcaster
from rollcast.comm.transfer.checkpoint_names import checkpoint_names
from rollcast.comm.transfer.conversion import Conversion
from rollcast.comm.transfer.holding import Holding, Weights
from rollcast.comm.transfer.landing import Landing, VerifyError
from rollcast.comm.transfer.lora_source import open_source
from rollcast.comm.transfer.receiver import WeightReceiver
from rollcast.comm.transfer.replicas import replica_checksums
from rollcast.comm.transfer.source import WeightSource
from rollcast.comm.transport import Group, LaneGroups, host_store, join_group

__all__ = [
    "Box",
    "Boxes",
    "Bucket",
    "Conversion",
    "Deadline",
    "Group",
    "HeldParam",
    "Holders",
    "Holding",
    "Kept",
    "Landing",
    "Lane",
    "LaneGroups",
    "Manifest",
    "Message",
    "Move",
    "Overlap",
    "ParamSpec",
    "PhaseTimer",
    "Region",
    "SyncReport",
    "TransferPlan",
    "VerifyError",
    "WeightBroadcaster",
    "WeightReceiver",
    "WeightSource",
    "Weights",
    "build_transfer",
    "checkpoint_names",
    "digest_of",
    "fill_buckets",
    "host_store",
    "join_group",
    "open_source",
    "replica_checksums",
    "statement_from_text",
    "statement_to_text",
]
