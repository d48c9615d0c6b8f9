"""A trainer and an engine on one GPU: the engine sleeps while the trainer trains (run by torchrun).

colocated.py MODEL_FOLDER REPORT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from models import build, perturb
from on_gpus import served

import rollcast.rollout as rollcast
from rollcast.comm.device.nvml import gpu_state, gpu_uuid


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
            report.write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    model = build("untied").cuda()
    broadcaster = job.broadcaster(model)
    broadcaster.self_test()
    found: dict[str, Any] = {"served": [], "used": []}
    for version, level in ((1, 1), (2, 2), (3, 1)):
        before = used()
        job.pool.sleep(level)
        found["used"].append([before, used()])
        perturb(model, seed=version)
        job.pool.wake_up(["weights"])
        broadcaster.sync(version=version, verify="full")
        job.pool.wake_up(["kv_cache"])
        found["served"].append(served(job, model))
    return found


def used() -> int:
    return gpu_state(gpu_uuid(torch.device("cuda", 0))).used_bytes


if __name__ == "__main__":
    main()
