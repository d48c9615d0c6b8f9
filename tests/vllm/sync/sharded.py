"""What an engine of two workers says of a trainer's mistakes, damaged bytes and weights that move (run by torchrun).

sharded.py MODEL_FOLDER REPORT.json      (1 trainer, 1 engine of 2 ranks)
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import build, perturb
from verify import failure, state

import rollcast.rollout as rollcast

FAULT = Path(os.environ["FAULT_FILE"])
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Weights = dict[str, torch.Tensor]
MISTAKES: dict[str, Callable[[Weights], Any]] = {
    "missing": lambda weights: weights.pop(K_PROJ),
    "extra": lambda weights: weights.update({"model.odd.weight": torch.ones(3)}),
    "another shape": lambda weights: weights.update({K_PROJ: torch.ones(64, 63)}),
    "another kind": lambda weights: weights.update({K_PROJ: torch.ones(64, 64, dtype=torch.int64)}),
}


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder,
        tensor_parallel_size=2,
        enforce_eager=True,
        bucket_bytes=16384,
        worker_extension_cls="faulty.FaultyWorker",
        log_dir=folder,
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, change in MISTAKES.items():
        weights = {name: tensor.detach() for name, tensor in build("tied").named_parameters()}
        change(weights)
        found[name] = failure(lambda weights=weights: job.broadcaster(weights).sync(version=1))
    found["after mistakes"] = state(job)
    model = build("tied")
    perturb(model, seed=1)
    broadcaster = job.broadcaster(model)
    broadcaster.sync(version=1, verify="checksum")
    for worker in (0, 1):
        FAULT.write_text(f"flip {worker}")
        found[f"flipped {worker}"] = failure(lambda: broadcaster.sync(version=2, verify="checksum"))
        found[f"after flipped {worker}"] = state(job)
    broadcaster.sync(version=2, verify="full")
    found["before moving"] = job.pool.fingerprints()
    FAULT.write_text("move")
    broadcaster.sync(version=3)
    found["after moving"] = job.pool.fingerprints()
    FAULT.write_text("")
    broadcaster.sync(version=4)
    FAULT.write_text("move unseen")
    found["unseen"] = failure(lambda: broadcaster.sync(version=5))
    FAULT.write_text("")
    broadcaster.sync(version=5)
    FAULT.write_text("move unseen")
    found["unseen aside"] = failure(lambda: broadcaster.sync(version=6, mode="shadow"))
    FAULT.write_text("")
    broadcaster.sync(version=6)
    found["after unseen"] = job.pool.fingerprints()
    FAULT.write_text("move to bfloat16")
    found["changed"] = failure(lambda: broadcaster.sync(version=7))
    FAULT.write_text("")
    found["changed for good"] = failure(lambda: broadcaster.sync(version=7))
    found["after changed"] = state(job)
    return found


if __name__ == "__main__":
    main()
