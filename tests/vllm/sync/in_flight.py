"""Syncs while requests are in flight, in every pause mode; two broadcasters; a closed pool (run by torchrun).

in_flight.py MODEL_FOLDER REPORT.json TRAINERS TENSOR_PARALLEL_SIZE

Every trainer rank has requests of its own, named alike, and writes a report of its own.
"""

import copy
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from models import build, perturb
from oracle import distances, said

import rollcast.rollout as rollcast

LENGTH = 400
STEP_S = 0.005
WAYS = (
    ("in_place", "keep", "kept"),
    ("in_place", "wait", "kept"),
    ("in_place", "abort", "kept"),
    ("shadow", "keep", "kept"),
    ("in_place", "keep", "recomputed"),
    ("shadow", "abort", "kept"),
)
PROMPTS = [[5, 6, 7], [9, 8, 3], [4, 4, 4]]
NAMES = ["a", "b", "c"]


def main() -> None:
    folder, report, trainers, size = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    config = rollcast.RolloutConfig(
        model=folder,
        trainers=trainers,
        tensor_parallel_size=size,
        enforce_eager=True,
        log_dir=folder,
        worker_extension_cls="slow_worker.SlowWorker",
    )
    facts: dict[str, Any] = {}
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        model = build("untied")
        broadcaster = job.broadcaster(model)
        # Later syncs are soon over, and requests are not.
        broadcaster.self_test()
        if job.trainer_rank == 0:
            job.pool.call_workers("slow_down", STEP_S)
        with ThreadPoolExecutor(1) as threads:
            for version, way in enumerate(WAYS, start=1):
                facts[" ".join(way)] = in_flight(job, broadcaster, model, threads, version=version, way=way)
        # The prompts of above are in the prefix cache with keys of older weights.
        facts["after"] = [after_switch(job, model, prompt) for prompt in PROMPTS]
        newer = job.broadcaster(model)
        facts["replaced"] = said(lambda: broadcaster.sync(version=9))
        facts["not newer"] = said(lambda: newer.sync(version=6))
        facts["unknown mode"] = said(lambda: newer.sync(version=7, pause_mode="never"))
        facts["newer"] = newer.sync(version=7).version
        facts["long prompt"] = said(lambda: job.pool.generate([[1], [2] * 1024], rollcast.Sampling()))
    facts["closed"] = said(lambda: job.pool.generate([[1]], rollcast.Sampling()))
    Path(f"{report}.{job.trainer_rank}").write_text(json.dumps(facts))


def in_flight(
    job: rollcast.Job,
    broadcaster: rollcast.PoolBroadcaster,
    model: torch.nn.Module,
    threads: ThreadPoolExecutor,
    *,
    version: int,
    way: tuple[str, str, str],
) -> list[list[Any]]:
    """What becomes of long requests that a sync meets half way; one batch after the other until it is over."""
    synced, old = threading.Event(), copy.deepcopy(model)
    running = threads.submit(generate, job, synced)
    # They have arrived by then, and are far from done on any machine.
    time.sleep(0.3)
    perturb(model, seed=version)
    mode, pause_mode, kv_cache = way
    broadcaster.sync(version=version, mode=mode, pause_mode=pause_mode, kv_cache=kv_cache)
    synced.set()
    return [
        [len(its.token_ids), len(its.logprobs), its.finish_reason, its.spans, *around_cut(old, model, prompt, its)]
        for prompt, its in running.result()
    ]


def generate(job: rollcast.Job, synced: threading.Event) -> list[tuple[list[int], rollcast.Completion]]:
    sampling = rollcast.Sampling(max_tokens=LENGTH, ignore_eos=True, n=4)
    pairs: list[tuple[list[int], rollcast.Completion]] = []
    while not pairs or not synced.is_set():
        groups = job.pool.generate(PROMPTS, sampling, request_ids=NAMES)
        pairs += [(prompt, sample) for prompt, group in zip(PROMPTS, groups, strict=True) for sample in group]
    return pairs


def around_cut(old: Any, new: Any, prompt: list[int], sample: rollcast.Completion) -> list[float]:
    """How far the sample's log-probabilities are from the old weights' before its cut, and at the token behind.

    And how far those behind are from the new weights' own, in one pass over all tokens.
    """
    if len(sample.spans) < 2:
        return []
    cut = sample.spans[1][1]
    theirs, ours = distances(old, prompt, sample), distances(new, prompt, sample)
    return [theirs[:cut].max().item(), theirs[cut].item(), ours[cut:].max().item()]


def after_switch(job: rollcast.Job, model: torch.nn.Module, prompt: list[int]) -> float:
    """Largest difference of log-probabilities between the engine and the trainer's own forward."""
    ((sample,),) = job.pool.generate([prompt], rollcast.Sampling(max_tokens=16, ignore_eos=True))
    return distances(model, prompt, sample).max().item()


if __name__ == "__main__":
    main()
