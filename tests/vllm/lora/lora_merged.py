"""Sync a peft model into engines without LoRA: its adapter is folded into the base weights (run by torchrun).

lora_merged.py MODEL_FOLDER REPORT.json
"""

import json
import sys
from pathlib import Path

from adapters import adapted, train
from lora import distance

import rollcast.rollout as rollcast


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(model=folder, enforce_eager=True, log_dir=str(report.parent))
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        model = adapted()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
        broadcaster = job.broadcaster(model)
        broadcaster.self_test()
        found: dict[str, list[float]] = {"distances": [], "apart": []}
        for version in (1, 2):
            train(model, seed=version)
            found["apart"].append(distance(job, model))
            broadcaster.sync(version=version, verify="full")
            found["distances"].append(distance(job, model))
        untouched = all((model.state_dict()[name] == tensor).all().item() for name, tensor in before.items())
        report.write_text(json.dumps(found | {"untouched": untouched}))


if __name__ == "__main__":
    main()
