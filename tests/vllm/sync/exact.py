"""Sync twice, save what was sent, and tell what the engines hold (run by torchrun).

exact.py ARCHITECTURE MODEL_FOLDER SAVE_FOLDER REPORT.json TRAINERS TENSOR_PARALLEL_SIZE CPU_WEIGHTS TRANSPORT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from architectures import build
from models import PROMPTS, perturb
from torch import distributed as dist

import rollcast.rollout as rollcast
from rollcast.launch.grpo.parallel import Trainers


def main() -> None:
    name, folder, save, report = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    trainers, tensor_parallel_size = int(sys.argv[5]), int(sys.argv[6])
    config = rollcast.RolloutConfig(
        model=folder,
        trainers=trainers,
        tensor_parallel_size=tensor_parallel_size,
        enforce_eager=True,
        # Else vLLM spends half a minute on the blocks of a large GPU's KV cache.
        gpu_memory_utilization=0.2,
        max_model_len=64,
        cpu_weights=sys.argv[7],
        transport=sys.argv[8],
        # Small buckets: most tensors are split.
        bucket_bytes=4096,
        log_dir=str(report.parent),
    )
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        group = Trainers(rank=job.trainer_rank, size=trainers, device=config.resolved_device())
        plain = build(name, seed=0)
        sharded = group.share(build(name, seed=0).to(group.device), "fsdp2")
        broadcaster = job.broadcaster(sharded)
        before = job.pool.fingerprints()
        broadcaster.self_test()
        for version in (1, 2):
            perturb(sharded, seed=version)
            perturb(plain, seed=version)
            mode, verify = (("in_place", "full"), ("shadow", "none"))[version - 1]
            sync = broadcaster.sync(version=version, mode=mode, verify=verify)
        greedy = job.pool.generate(PROMPTS, rollcast.Sampling(temperature=0.0, max_tokens=12, ignore_eos=True))
        if job.trainer_rank == 0:
            plain.save_pretrained(save)
            plain.to(group.device)
            expected = [greedy_tokens(plain, prompt, 12) for prompt in PROMPTS]
            facts = {
                "before": before,
                "fingerprints": job.pool.fingerprints(),
                "tokens": [samples[0].token_ids for samples in greedy],
                "versions": [samples[0].versions for samples in greedy],
                "expected": expected,
                "describe": [[state.version, state.refusal] for state in job.pool.describe()],
                "sync": sync.to_dict(),
            }
            report.write_text(json.dumps(facts))
        if trainers > 1:
            dist.barrier()
        group.close()


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by full forward passes of transformers: no cache, no sampler."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens], device=model.device)).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


if __name__ == "__main__":
    main()
