"""The transport of a lane: as configured, or the fastest that its GPUs allow (every trainer rank)."""

from collections.abc import Sequence

from rollcast.comm import Lane
from rollcast.comm.device.nvml import NVLINK
from rollcast.rollout.config import RolloutConfig
from rollcast.rollout.protocol.registry import RankInfo

# Most messages of a lane for which "auto" lets a worker read the trainer's memory over NVLink. That is faster for few
# tensors, but costs more for each message than NCCL does: for the 18,867 tensors of Qwen3-30B-A3B NCCL is faster.
MAX_IPC_MESSAGES = 4096


def choose_transport(lane: Lane, *, config: RolloutConfig, ranks: Sequence[RankInfo]) -> str:
    """Return the transport of a lane: as configured, or for "auto" the fastest that the ranks' GPUs allow.

    `ranks` is in rank order.
    """
    if config.resolved_device() == "cpu":
        return "gloo"
    if config.transport != "auto":
        return config.transport
    sender, receivers = ranks[lane.sender], [ranks[config.trainers + worker] for worker in lane.workers]
    local = [receiver for receiver in receivers if receiver.host == sender.host]
    if any(receiver.gpu == sender.gpu for receiver in local) or (config.colocate and len(local) == len(receivers)):
        # NCCL cannot join two ranks on one GPU; its kernels take turns with those of other processes there.
        return "ipc"
    # Several readers would share the bandwidth of the sender's links, where NCCL's can pass on what they have.
    single = len(local) == len(receivers) == 1 and sender.links.get(local[0].gpu or "") == NVLINK
    return "ipc" if single and len(lane.messages) <= MAX_IPC_MESSAGES else "nccl"
