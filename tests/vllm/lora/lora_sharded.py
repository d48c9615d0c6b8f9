"""Two FSDP2 trainers, and an engine that takes their adapter or the whole folded model (run by torchrun).

lora_sharded.py MODEL_FOLDER REPORT.json LORA_RANK      (0: engines without LoRA)
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from adapters import adapted
from lora import distance
from models import build
from oracle import error_text
from torch import distributed as dist

import rollcast.rollout as rollcast
from rollcast.launch.grpo.parallel import Trainers


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """What rank 0 sees of two syncs, and of a third in which the ranks disagree."""

    distances: list[float]
    """How far the engine's log-probabilities are from those of the synced model, after each sync."""
    distances_from_base: list[float]
    scaling_problem: str
    """Error where rank 1 has another LoRA scaling; empty without LoRA in the engines."""


def main() -> None:
    folder, report, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    config = rollcast.RolloutConfig(
        model=folder,
        trainers=2,
        lora_rank=rank or None,
        enforce_eager=True,
        bucket_bytes=4096,
        log_dir=str(report.parent),
    )
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        group = Trainers(rank=job.trainer_rank, size=2, device=config.resolved_device())
        base, plain = build("untied"), adapted()
        sharded: Any = group.share(adapted(), "fsdp2")
        broadcaster = job.broadcaster(sharded)
        after_sync: list[float] = []
        from_base: list[float] = []
        for version in (1, 2):
            for model in (plain, sharded):
                change(model, seed=version)
            broadcaster.sync(version=version, verify="full")
            after_sync.append(distance(job, plain))
            from_base.append(distance(job, base))
            dist.barrier()
        if job.trainer_rank == 1:
            sharded.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 7.0)
        problem = error_text(lambda: broadcaster.sync(version=3)) if rank else ""
        if job.trainer_rank == 0:
            facts = Sharded(distances=after_sync, distances_from_base=from_base, scaling_problem=problem)
            report.write_bytes(msgspec.json.encode(facts))
        dist.barrier()
        group.close()


def change(model: Any, *, seed: int) -> None:
    """Change A and B, the same way on every rank and however they are sharded."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.mul_(1.5 + 0.1 * (seed + index % 7)).add_(0.02 * (index % 5))


if __name__ == "__main__":
    main()
