"""A trainer and an engine on one GPU: the engine sleeps while the trainer trains (run by torchrun).

colocated.py MODEL_FOLDER REPORT.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from models import build, perturb
from on_gpus import Served, greedy_answers

import rollcast.rollout as rollcast
from rollcast.comm.device.nvml import gpu_state, gpu_uuid


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """One sleep of the engine, and what it serves after the sync that follows."""

    awake_bytes: int
    """Memory used on the GPU before the engine sleeps, and while it does."""
    asleep_bytes: int
    served: list[Served]


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder,
        colocate=True,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        engine_args={"enable_sleep_mode": True},
        log_dir=str(report.parent),
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_bytes(msgspec.json.encode(run_cycles(job)))


def run_cycles(job: rollcast.Job) -> list[Cycle]:
    model = build("untied").cuda()
    broadcaster = job.broadcaster(model)
    broadcaster.self_test()
    cycles: list[Cycle] = []
    for version, level in ((1, 1), (2, 2), (3, 1)):
        awake_bytes = used_bytes()
        job.pool.sleep(level)
        asleep_bytes = used_bytes()
        perturb(model, seed=version)
        job.pool.wake_up(["weights"])
        broadcaster.sync(version=version, verify="full")
        job.pool.wake_up(["kv_cache"])
        cycles.append(Cycle(awake_bytes=awake_bytes, asleep_bytes=asleep_bytes, served=greedy_answers(job, model)))
    return cycles


def used_bytes() -> int:
    return gpu_state(gpu_uuid(torch.device("cuda", 0))).used_bytes


if __name__ == "__main__":
    main()
