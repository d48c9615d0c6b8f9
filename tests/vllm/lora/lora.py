"""Sync adapters of a peft model into engines that keep their base weights (run by torchrun).

lora.py MODEL_FOLDER REPORT.json TENSOR_PARALLEL_SIZE LORA_VERSIONS
"""

import copy
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from adapters import PROMPTS, RANK, adapted, train
from models import build
from oracle import distances, said
from torch.nn.functional import pad

import rollcast.rollout as rollcast

LENGTH = 300
STEP_S = 0.01
MAX_RANK = 16
# Where vLLM keeps what is trained as the module of this name.
PLACES = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2), "o_proj": ("o_proj", 0)}
PLACES |= {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "lm_head": ("lm_head", 0),
}
SHORT = rollcast.Sampling(max_tokens=12, ignore_eos=True, n=2)
LONG = rollcast.Sampling(max_tokens=LENGTH, ignore_eos=True)


def main() -> None:
    folder, report, tensor_parallel_size, versions = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config = rollcast.RolloutConfig(
        model=folder,
        tensor_parallel_size=tensor_parallel_size,
        lora_rank=RANK,
        lora_versions=versions,
        enforce_eager=True,
        worker_extension_cls="lora_worker.LoraWorker",
        log_dir=str(report.parent),
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job, versions)))


def facts(job: rollcast.Job, versions: int) -> dict[str, Any]:
    model = adapted(use_rslora=True, rank_pattern={"down_proj": 3})
    found: dict[str, Any] = {"fingerprints": [job.pool.fingerprints()]}
    found["base"] = distance(job, build("untied"))
    found["refused"] = refusals(job)
    broadcaster = job.broadcaster(model)
    found["bytes"] = []
    found |= {"distances": [], "apart": [], "versions": [], "misplaced": []}
    for version, (mode, verify) in enumerate([("in_place", "full"), ("in_place", "checksum"), ("shadow", "full")], 1):
        before = copy.deepcopy(model)
        train(model, seed=version)
        found["bytes"].append(broadcaster.sync(version=version, mode=mode, verify=verify).nbytes)
        found["distances"].append(distance(job, model))
        found["apart"].append(distance(job, before))
        found["misplaced"].append(misplaced(model, job.pool.call_workers("show_slots")[0], version % versions))
        found["versions"].append([state.version for state in job.pool.describe()])
    found["in flight"] = in_flight(job, broadcaster, model)
    found["fingerprints"].append(job.pool.fingerprints())
    found["self test"] = said(broadcaster.self_test)
    found["sleep"] = said(lambda: job.pool.sleep(level=2))
    return found


def distance(job: rollcast.Job, model: Any) -> float:
    """Largest difference of log-probabilities between the engines and the model's own forward."""
    groups = job.pool.generate(PROMPTS, SHORT)
    return max(
        distances(model, prompt, sample).max().item()
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for sample in group
    )


def misplaced(model: Any, workers: list[dict[str, list]], slot: int) -> list[str]:
    """Stacks of a slot that are not A, or B times the scaling, with zeros around; none of them is left out."""
    expected: dict[str, torch.Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        path, dot, part = name.rpartition(".")
        if part in PLACES:
            fused, index = PLACES[part]
            a, b = torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0)
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"]
            expected[f"{path}{dot}{fused}.lora_a.{index}"] = pad(a, (0, 0, 0, MAX_RANK - a.shape[0]))
            expected[f"{path}{dot}{fused}.lora_b.{index}"] = pad(b, (0, MAX_RANK - b.shape[1]))
    assert all(shown.keys() == expected.keys() for shown in workers)
    found = {name: [torch.tensor(shown[name][slot]) for shown in workers] for name in expected}
    return [name for name, stack in expected.items() if not is_of(stack, found[name])]


def is_of(whole: torch.Tensor, shards: list[torch.Tensor]) -> bool:
    """Whether every shard is the whole, or all are its rows or columns."""
    if all(shard.shape == whole.shape for shard in shards):
        return all(torch.equal(shard, whole) for shard in shards)
    dim = 0 if shards[0].shape[1] == whole.shape[1] else 1
    return torch.equal(torch.cat(shards, dim), whole)


def in_flight(job: rollcast.Job, broadcaster: rollcast.PoolBroadcaster, model: Any) -> list[list[Any]]:
    """Requests that two syncs meet half way: their spans, and how far each span is from its version's model."""
    models = {3: copy.deepcopy(model)}
    for version in (4, 5):
        train(model, seed=version, steps=1)
        models[version] = copy.deepcopy(model)
    job.pool.call_workers("slow_down", STEP_S)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(job.pool.generate, PROMPTS[:2], LONG)
        for version in (4, 5):
            time.sleep(0.2)
            # Others that are sent later have been answered: these are on their way.
            job.pool.generate(PROMPTS[2:], SHORT)
            model.load_state_dict(models[version].state_dict())
            broadcaster.sync(version=version)
        groups = running.result()
    return [
        [sample.spans, *first_spans(models, prompt, sample)]
        for prompt, (sample,) in zip(PROMPTS[:2], groups, strict=True)
    ]


def first_spans(models: dict[int, Any], prompt: list[int], sample: rollcast.Completion) -> list[float]:
    """Of the tokens of the first version: the distance from it, and that of the token behind them, if any."""
    differences = distances(models[sample.spans[0][0]], prompt, sample)
    end = sample.spans[1][1] if len(sample.spans) > 1 else len(sample.token_ids)
    return [differences[:end].max().item(), *differences[end : end + 20].tolist()]


def refusals(job: rollcast.Job) -> dict[str, str]:
    """What is said about adapters that engines cannot serve as they are."""
    settings: dict[str, dict[str, Any]] = {
        "rank": {"r": 17},
        "module": {"target_modules": ["q_proj", "embed_tokens"]},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "bias": {"bias": "all"},
        "saved": {"modules_to_save": ["lm_head"]},
    }
    said_of = {name: said(lambda its=its: sync(job, adapted(**its))) for name, its in settings.items()}
    wide = build("untied", intermediate_size=128)
    return said_of | {
        "full": said(lambda: sync(job, build("untied"))),
        "size": said(lambda: sync(job, adapted(base=wide))),
    }


def sync(job: rollcast.Job, model: Any) -> None:
    job.broadcaster(model).sync(version=1)


if __name__ == "__main__":
    main()
