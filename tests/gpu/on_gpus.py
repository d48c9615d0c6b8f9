"""Syncs into an engine with CUDA graphs and async scheduling: what it serves, while and after (run by torchrun).

on_gpus.py MODEL_FOLDER REPORT.json TRANSPORT
"""

import gc
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from exact import greedy_tokens
from models import PROMPTS, build, perturb

import rollcast.rollout as rollcast

LENGTH = 900
SYNCS = 100
MODES = ("in_place", "shadow")


def main() -> None:
    folder, report, transport = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    config = rollcast.RolloutConfig(
        model=folder,
        transport=transport,
        gpu_memory_utilization=0.3,
        worker_extension_cls="gpu_worker.GpuWorker",
        sync_timeout_s=20.0,
        log_dir=str(report.parent),
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    torch.cuda.set_device(0)
    model = build("untied").cuda()
    broadcaster = job.broadcaster(model)
    broadcaster.self_test()
    found: dict[str, Any] = {"served": [], "in flight": []}
    for version in range(1, 5):
        perturb(model, seed=version)
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(in_flight, job)
            time.sleep(0.2)
            broadcaster.sync(version=version, mode=MODES[version % 2], verify="checksum")
            found["in flight"].append(running.result())
        found["served"].append(served(job, model))
    found |= failing(job, broadcaster, version=5)
    perturb(model, seed=5)
    watched = broadcaster.sync(version=6, hardware=True)
    found["gpus"] = [[gpu.rank, gpu.used_bytes, gpu.nvlink_received_bytes] for gpu in watched.gpus]
    for version in range(7, 17):
        broadcaster.sync(version=version, mode=MODES[version % 2])
    found["memory"] = [memory(job)]
    for version in range(17, 17 + SYNCS):
        broadcaster.sync(version=version, mode=MODES[version % 2])
    found["memory"].append(memory(job))
    found["served"].append(served(job, model))
    return found


def in_flight(job: rollcast.Job) -> list[Any]:
    """Length and versions of requests that a sync meets half way."""
    sampling = rollcast.Sampling(max_tokens=LENGTH, ignore_eos=True, n=4)
    return [[len(its.token_ids), its.versions] for group in job.pool.generate(PROMPTS, sampling) for its in group]


def served(job: rollcast.Job, model: Any) -> list[Any]:
    """Greedy tokens of the engine and of transformers."""
    sampling = rollcast.Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    groups = job.pool.generate(PROMPTS, sampling)
    return [
        [group[0].token_ids, greedy_tokens(model, prompt, 12)] for group, prompt in zip(groups, PROMPTS, strict=True)
    ]


def failing(job: rollcast.Job, broadcaster: rollcast.PoolBroadcaster, *, version: int) -> dict[str, Any]:
    """A worker raises: what the trainer hears, and when."""
    job.pool.call_workers("fail_next")
    start = time.perf_counter()
    try:
        broadcaster.sync(version=version)
    except rollcast.SyncError as error:
        return {"failure": [str(error), time.perf_counter() - start]}
    return {"failure": ["none", 0.0]}


def memory(job: rollcast.Job) -> list[int]:
    # What a failed sync's exception held.
    gc.collect()
    ((worker,),) = job.pool.call_workers("memory")
    return [*worker, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]


if __name__ == "__main__":
    main()
