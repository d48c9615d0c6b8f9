"""Sync twice, save what was sent, and report what the engines hold (every trainer rank).

exact.py JSON (a `SyncJob`)

Run by torchrun for the architectures that have no shared job, and on GPUs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from architectures import build
from models import PROMPTS, perturb
from oracle import greedy_tokens
from shapes import MODELS
from torch import distributed as dist
from trainer import Trainer

import rollcast.rollout as rollcast
from rollcast.launch.grpo.parallel import Trainers


@dataclass(frozen=True, kw_only=True)
class SyncJob:
    """What a job of this script does, and where it reads and writes."""

    architecture: str
    """A name that `architectures.build` takes."""
    initial: str
    """Folder of the model that the engines load."""
    saved: str
    """Folder for the model after the second sync."""
    report: str
    """File for rank 0's `Synced`."""
    trainers: int
    tensor_parallel_size: int
    cpu_weights: str
    transport: str


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What a trainer rank sees after two syncs."""

    before: list[list[dict[str, str]]]
    """Fingerprints before the syncs."""
    fingerprints: list[list[dict[str, str]]]
    tokens: list[list[int]]
    """Greedy completions of `models.PROMPTS`."""
    token_versions: list[list[int]]
    expected: list[list[int]]
    """Transformers' greedy tokens."""
    version: int
    """The version of the second sync."""
    states: list[tuple[int, str | None]]
    """Version and refusal by engine."""
    workers: int
    """How many the sync's report names."""


def main() -> None:
    what = msgspec.json.decode(sys.argv[1], type=SyncJob)
    config = rollcast.RolloutConfig(
        model=what.initial,
        trainers=what.trainers,
        tensor_parallel_size=what.tensor_parallel_size,
        enforce_eager=True,
        # Else vLLM spends half a minute on the blocks of a large GPU's KV cache.
        gpu_memory_utilization=0.2,
        max_model_len=64,
        cpu_weights=what.cpu_weights,
        transport=what.transport,
        # Small buckets: most tensors are split.
        bucket_bytes=4096,
        log_dir=str(Path(what.report).parent),
    )
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        group = Trainers(rank=job.trainer_rank, size=what.trainers, device=config.resolved_device())
        synced = sync_twice(job, group, partial(build, what.architecture, seed=0), Path(what.saved))
        if job.trainer_rank == 0:
            Path(what.report).write_bytes(msgspec.json.encode(synced))
        if what.trainers > 1:
            dist.barrier()
        group.close()


def sync_twice_shared(trainer: Trainer, model: str, save: Path) -> Synced:
    """The same in a job that tests share, with a model of `shapes.MODELS`. Collective."""
    return sync_twice(trainer.job, trainer.group, MODELS[model], save)


def sync_twice(job: rollcast.Job, group: Trainers, build_model: Callable[[], Any], save: Path) -> Synced:
    """Sync a sharded model twice; rank 0 saves it. Collective."""
    plain = build_model()
    sharded = group.share(build_model().to(group.device), "fsdp2")
    broadcaster = job.broadcaster(sharded)
    before = job.pool.fingerprints()
    report = broadcaster.self_test()
    for seed in (1, 2):
        perturb(sharded, seed=seed)
        perturb(plain, seed=seed)
        mode, verify = (("in_place", "full"), ("shadow", "none"))[seed - 1]
        report = broadcaster.sync(version=broadcaster.version + 1, mode=mode, verify=verify)
    greedy = job.pool.generate(PROMPTS, rollcast.Sampling(temperature=0.0, max_tokens=12, ignore_eos=True))
    if job.trainer_rank == 0:
        plain.save_pretrained(save)
    plain.to(group.device)
    return Synced(
        before=before,
        fingerprints=job.pool.fingerprints(),
        tokens=[samples[0].token_ids for samples in greedy],
        token_versions=[[*samples[0].versions] for samples in greedy],
        expected=[greedy_tokens(plain, prompt, 12) for prompt in PROMPTS],
        version=report.version,
        states=[(state.version, state.refusal) for state in job.pool.describe()],
        workers=len(report.workers),
    )


if __name__ == "__main__":
    main()
