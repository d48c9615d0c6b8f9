"""Two processes and a transport, without vLLM (run by torchrun).

transport.py TRANSPORT PLACE REPORT.json

PLACE: "apart" on two GPUs, "shared" on one, or "cpu". As in a job, the receiver sees its own GPU only.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rollcast.comm import Deadline, host_store, join_group
from rollcast.comm.transport import PersistentTensors
from rollcast.rollout.job.world import World

RANK = int(os.environ["RANK"])
TRANSPORT, PLACE, REPORT = sys.argv[1:]
SIZES = [1, 255, 256, 4097, 1 << 20, (1 << 20) + 3, 1 << 24, 1 << 26]
ROUNDS = 8
GIBIBYTE = 1 << 30


def main() -> None:
    # A job that hangs says where.
    faulthandler.dump_traceback_later(40, exit=True)
    device = torch.device("cpu" if PLACE == "cpu" else "cuda:0")
    if RANK and PLACE == "apart":
        # Before CUDA starts in this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    job = World.from_env(trainers=1, tensor_parallel_size=1).store(timeout_s=30, scope="transport")
    store: Any = None
    if RANK == 0:
        store, address = host_store("127.0.0.1", timeout_s=30)
        job.set("address", address)
    where: Any = store or job.get("address").decode()
    label = f"process {RANK}"
    group = join_group(TRANSPORT, where, rank=RANK, size=2, deadline=Deadline(20), device=device, label=label)
    persistent = zeros(device)
    wrong = [turn for turn in range(ROUNDS) if not exchange(group, persistent if turn % 3 else zeros(device), turn)]
    facts = {"wrong": wrong, "gb_per_s": speed(group, device), "left": leave(group, device)}
    if RANK == 0:
        Path(REPORT).write_text(json.dumps(facts))
        job.set("done", "")
    else:
        Path(f"{REPORT}.receiver").write_text(json.dumps(facts))
        job.wait(["done"])


def zeros(device: torch.device) -> PersistentTensors:
    return PersistentTensors(torch.zeros(size, dtype=torch.uint8, device=device) for size in SIZES)


def exchange(group: Any, tensors: PersistentTensors, turn: int) -> bool:
    """Whether the receiver gets the sender's bytes, by kernel and by copy engine."""
    expected = [(turn * 7 + index) % 251 for index in range(len(SIZES))]
    for tensor, value in zip(tensors, expected, strict=True):
        tensor.fill_(value if RANK == 0 else 255)
    group.low_priority = turn % 2 == 0
    group.broadcast(tensors, root=0, deadline=Deadline(10)).wait(Deadline(10))
    return all(bool((tensor == value).all()) for tensor, value in zip(tensors, expected, strict=True))


def speed(group: Any, device: torch.device) -> float:
    """GB/s of the best of some broadcasts of 1 GiB."""
    buffer = torch.zeros(GIBIBYTE, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        group.broadcast([buffer], root=0, deadline=Deadline(10)).wait(Deadline(10))
        best = max(best, GIBIBYTE / 1e9 / (time.perf_counter() - start))
    return best


def leave(group: Any, device: torch.device) -> list[Any]:
    """What the sender hears, and when, if the receiver leaves instead of taking part."""
    if RANK:
        time.sleep(0.5)
        group.close()
        return []
    start = time.perf_counter()
    try:
        group.broadcast([torch.zeros(GIBIBYTE, dtype=torch.uint8, device=device)], root=0, deadline=Deadline(20)).wait(
            Deadline(20)
        )
        words = "nothing"
    except RuntimeError as error:
        words = str(error)
    group.close()
    return [words, time.perf_counter() - start]


if __name__ == "__main__":
    main()
