"""Syncs into an engine with CUDA graphs and async scheduling: what it serves, while and after (run by torchrun).

on_gpus.py MODEL_FOLDER REPORT.json TRANSPORT
"""

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from models import PROMPTS, build, perturb
from oracle import greedy_tokens

import rollcast.rollout as rollcast

LENGTH = 900
SYNCS = 100
MODES = ("in_place", "shadow")


@dataclass(frozen=True, kw_only=True)
class Served:
    """Greedy tokens of the engine and of transformers for one prompt."""

    tokens: list[int]
    expected: list[int]


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A request that a sync meets half way."""

    tokens: int
    versions: list[int]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A sync in which a worker raises: the error, and after how long."""

    text: str
    after_s: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that torch has allocated and reserved, in the worker and in the trainer."""

    worker: list[int]
    trainer: list[int]


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """What a sync's report has about a GPU."""

    rank: int
    used_bytes: int
    nvlink_received_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the trainer sees."""

    served: list[list[Served]]
    """After each of some syncs, by prompt."""
    in_flight: list[list[InFlight]]
    """By sync; the first is version 1."""
    failure: Failure
    gpus: list[GpuUse]
    memory_before: Memory
    memory_after: Memory
    """After many syncs more."""


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
            report.write_bytes(msgspec.json.encode(collect_facts(job)))


def collect_facts(job: rollcast.Job) -> Facts:
    torch.cuda.set_device(0)
    model = build("untied").cuda()
    broadcaster = job.broadcaster(model)
    broadcaster.self_test()
    answers: list[list[Served]] = []
    in_flight: list[list[InFlight]] = []
    for version in range(1, 5):
        perturb(model, seed=version)
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(generate_long, job)
            # All prompts are read by then, and nothing has ended.
            time.sleep(0.8)
            broadcaster.sync(version=version, mode=MODES[version % 2], verify="checksum")
            in_flight.append(running.result())
        answers.append(greedy_answers(job, model))
    failure = fail_sync(job, broadcaster, version=5)
    perturb(model, seed=5)
    watched = broadcaster.sync(version=6, hardware=True)
    for version in range(7, 17):
        broadcaster.sync(version=version, mode=MODES[version % 2])
    memory_before = memory(job)
    for version in range(17, 17 + SYNCS):
        broadcaster.sync(version=version, mode=MODES[version % 2])
    memory_after = memory(job)
    answers.append(greedy_answers(job, model))
    return Facts(
        served=answers,
        in_flight=in_flight,
        failure=failure,
        gpus=[
            GpuUse(rank=gpu.rank, used_bytes=gpu.used_bytes, nvlink_received_bytes=gpu.nvlink_received_bytes)
            for gpu in watched.gpus
        ],
        memory_before=memory_before,
        memory_after=memory_after,
    )


def generate_long(job: rollcast.Job) -> list[InFlight]:
    sampling = rollcast.Sampling(max_tokens=LENGTH, ignore_eos=True, n=4)
    return [
        InFlight(tokens=len(sample.token_ids), versions=[*sample.versions])
        for group in job.pool.generate(PROMPTS, sampling)
        for sample in group
    ]


def greedy_answers(job: rollcast.Job, model: Any) -> list[Served]:
    sampling = rollcast.Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    groups = job.pool.generate(PROMPTS, sampling)
    return [
        Served(tokens=sample.token_ids, expected=greedy_tokens(model, prompt, 12))
        for (sample,), prompt in zip(groups, PROMPTS, strict=True)
    ]


def fail_sync(job: rollcast.Job, broadcaster: rollcast.PoolBroadcaster, *, version: int) -> Failure:
    job.pool.call_workers("fail_next")
    start = time.perf_counter()
    try:
        broadcaster.sync(version=version)
    except rollcast.SyncError as error:
        return Failure(text=str(error), after_s=time.perf_counter() - start)
    return Failure(text="", after_s=0.0)


def memory(job: rollcast.Job) -> Memory:
    # What a failed sync's exception held.
    gc.collect()
    ((worker,),) = job.pool.call_workers("memory")
    return Memory(worker=worker, trainer=[torch.cuda.memory_allocated(), torch.cuda.memory_reserved()])


if __name__ == "__main__":
    main()
