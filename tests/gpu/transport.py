"""Two processes and a transport, without vLLM (run by torchrun).

transport.py TRANSPORT PLACE REPORT.json

PLACE: "apart" on two GPUs, "shared" on one, or "cpu". As in a job, the receiver sees its own GPU only.
"""

import faulthandler
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from rollcast.comm import Deadline, Group, host_store, join_group
from rollcast.comm.transport import PersistentTensors
from rollcast.rollout.job.world import World

SIZES = [1, 255, 256, 4097, 1 << 20, (1 << 20) + 3, 1 << 24, 1 << 26]
ROUNDS = 8
GIBIBYTE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LostPeer:
    """The sender's broadcast while the receiver leaves: its error, empty if there was none, and when it ended."""

    problem: str
    after_s: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one of the two processes sees."""

    wrong: list[int]
    """Rounds whose bytes did not arrive."""
    gb_per_s: float
    lost_peer: LostPeer | None
    """None in the receiver."""


def main() -> None:
    rank = int(os.environ["RANK"])
    transport, place, report = sys.argv[1:]
    # A job that hangs says where.
    faulthandler.dump_traceback_later(40, exit=True)
    device = torch.device("cpu" if place == "cpu" else "cuda:0")
    if rank and place == "apart":
        # Before CUDA starts in this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    job = World.from_env(trainers=1, tensor_parallel_size=1).store(timeout_s=30, scope="transport")
    store: Any = None
    if rank == 0:
        store, address = host_store("127.0.0.1", timeout_s=30)
        job.set("address", address)
    where: Any = store or job.get("address").decode()
    label = f"process {rank}"
    group = join_group(transport, where, rank=rank, size=2, deadline=Deadline(20), device=device, label=label)
    persistent = zeros(device)
    wrong = [turn for turn in range(ROUNDS) if not exchange(group, persistent if turn % 3 else zeros(device), turn)]
    gb_per_s = speed(group, device)
    facts = Facts(wrong=wrong, gb_per_s=gb_per_s, lost_peer=lose_peer(group, device) if rank == 0 else leave(group))
    Path(f"{report}.{rank}").write_bytes(msgspec.json.encode(facts))
    if rank == 0:
        job.set("done", "")
    else:
        job.wait(["done"])


def zeros(device: torch.device) -> PersistentTensors:
    return PersistentTensors(torch.zeros(size, dtype=torch.uint8, device=device) for size in SIZES)


def exchange(group: Group, tensors: PersistentTensors, turn: int) -> bool:
    """Whether the receiver gets the sender's bytes, by kernel and by copy engine."""
    expected = [(turn * 7 + index) % 251 for index in range(len(SIZES))]
    for tensor, value in zip(tensors, expected, strict=True):
        tensor.fill_(value if group.rank == 0 else 255)
    group.low_priority = turn % 2 == 0
    group.broadcast(tensors, root=0, deadline=Deadline(10)).wait(Deadline(10))
    return all(bool((tensor == value).all()) for tensor, value in zip(tensors, expected, strict=True))


def speed(group: Group, device: torch.device) -> float:
    """GB/s of the best of some broadcasts of 1 GiB."""
    buffer = torch.zeros(GIBIBYTE, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        group.broadcast([buffer], root=0, deadline=Deadline(10)).wait(Deadline(10))
        best = max(best, GIBIBYTE / 1e9 / (time.perf_counter() - start))
    return best


def leave(group: Group) -> None:
    """Leave instead of taking part in the next broadcast (the receiver)."""
    time.sleep(0.5)
    group.close()


def lose_peer(group: Group, device: torch.device) -> LostPeer:
    """Broadcast while the receiver leaves (the sender)."""
    problem, start = "", time.perf_counter()
    try:
        group.broadcast([torch.zeros(GIBIBYTE, dtype=torch.uint8, device=device)], root=0, deadline=Deadline(20)).wait(
            Deadline(20)
        )
    except RuntimeError as error:
        problem = str(error)
    group.close()
    return LostPeer(problem=problem, after_s=time.perf_counter() - start)


if __name__ == "__main__":
    main()
