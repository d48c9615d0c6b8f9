"""Two FSDP2 trainers, and an engine that takes their adapter or the whole folded model (run by torchrun).

lora_sharded.py MODEL_FOLDER REPORT.json LORA_RANK      (0: engines without LoRA)
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from adapters import adapted
from lora import distance
from models import build
from oracle import said
from torch import distributed as dist

import rollcast.rollout as rollcast
from rollcast.launch.grpo.parallel import Trainers


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
        found: dict[str, Any] = {"distances": [], "apart": []}
        for version in (1, 2):
            for model in (plain, sharded):
                change(model, seed=version)
            broadcaster.sync(version=version, verify="full")
            found["distances"].append(distance(job, plain))
            found["apart"].append(distance(job, base))
            dist.barrier()
        if job.trainer_rank == 1:
            sharded.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 7.0)
        found["scaling"] = said(lambda: broadcaster.sync(version=3)) if rank else ""
        if job.trainer_rank == 0:
            report.write_text(json.dumps(found))
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
