"""The transport of a lane follows the machines and GPUs of its ranks, and the number of its messages."""

from typing import Any

import pytest
import torch

from rollcast.comm import Lane, Move, Region
from rollcast.comm.plan.buckets import fill_buckets
from rollcast.rollout import RolloutConfig
from rollcast.rollout.protocol.registry import RankInfo
from rollcast.rollout.sync.transport_choice import MAX_IPC_MESSAGES, choose_transport


def rank_info(gpu: str, *, host: str = "a", **facts: Any) -> RankInfo:
    return RankInfo(host, gpu, 2, "10.0.0.1", **facts)


SENDER = rank_info("GPU-0", links={"GPU-1": "NVLink", "GPU-2": "NVLink", "GPU-3": "one PCIe switch"})
ROW = Region((4,), (1,), 0, torch.float32)


@pytest.mark.parametrize(
    ("receivers", "settings", "expected"),
    [
        ([rank_info("GPU-1")], {}, "ipc"),
        ([rank_info("GPU-3")], {}, "nccl"),
        ([rank_info("GPU-0")], {}, "ipc"),
        ([rank_info("GPU-1", host="b")], {}, "nccl"),
        ([rank_info("GPU-1"), rank_info("GPU-2")], {}, "nccl"),
        ([rank_info("GPU-3")], {"colocate": True}, "ipc"),
        ([rank_info("GPU-1", host="b")], {"colocate": True}, "nccl"),
        ([rank_info("GPU-1")], {"transport": "ipc"}, "ipc"),
        ([rank_info("GPU-0")], {"transport": "nccl"}, "nccl"),
        ([rank_info("GPU-1")], {"device": "cpu"}, "gloo"),
    ],
    ids=[
        "NVLink",
        "PCIe",
        "one GPU",
        "two machines",
        "two workers",
        "colocated",
        "colocated, two machines",
        "set to ipc",
        "set to nccl",
        "CPU",
    ],
)
def test_auto_transport_follows_the_gpus(receivers: list[RankInfo], settings: dict[str, Any], expected: str) -> None:
    chosen: dict[str, Any] = {"device": "cuda"} | settings
    config = RolloutConfig(model="", dtype="float32", **chosen)
    lane = Lane(0, 0, tuple(range(len(receivers))), ())
    assert choose_transport(lane, config=config, ranks=[SENDER, *receivers]) == expected


@pytest.mark.parametrize(
    ("gpu", "messages", "expected"),
    [
        ("GPU-1", 399, "ipc"),
        ("GPU-1", MAX_IPC_MESSAGES, "ipc"),
        ("GPU-1", MAX_IPC_MESSAGES + 1, "nccl"),
        ("GPU-1", 18_867, "nccl"),
        ("GPU-0", 18_867, "ipc"),
    ],
    ids=["8B", "at the limit", "above the limit", "30B-A3B", "one GPU"],
)
def test_auto_transport_sends_many_messages_by_nccl_unless_a_gpu_is_shared(
    gpu: str, messages: int, expected: str
) -> None:
    moves = [Move(param, ROW, f"t{param}", ROW) for param in range(messages)]
    lane = Lane(0, 0, (0,), fill_buckets(moves, range(messages), bucket_bytes=1 << 20))
    assert sum(len(bucket.messages) for bucket in lane.buckets) == messages
    config = RolloutConfig(model="", dtype="float32", device="cuda")
    assert choose_transport(lane, config=config, ranks=[SENDER, rank_info(gpu)]) == expected
