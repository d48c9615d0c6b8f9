"""Adapters in engines that keep their base weights: how far they are from peft, where they land (trainer ranks)."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from adapters import PROMPTS, train
from oracle import distances
from torch.nn.functional import pad
from trainer import SHORT, Trainer

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
LONG = rollcast.Sampling(max_tokens=LENGTH, ignore_eos=True)
Groups = list[list[rollcast.Completion]]


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A request that two syncs meet half way."""

    versions: list[int]
    before: float
    """Largest distance of the first version's tokens from that version's model."""
    behind: list[float]
    """Distances from the same model of the tokens right behind them, if any."""


def groups_distance(groups: Groups, model: Any) -> float:
    """Largest difference of log-probabilities between completions of `PROMPTS` and the model's own forward."""
    return max(
        distances(model, prompt, sample).max().item()
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for sample in group
    )


def distance(job: rollcast.Job, model: Any) -> float:
    """Largest difference of log-probabilities between the engines and the model's own forward."""
    return groups_distance(job.pool.generate(PROMPTS, SHORT), model)


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
    assert all(stacks.keys() == expected.keys() for stacks in workers)
    shards = {name: [torch.tensor(stacks[name][slot]) for stacks in workers] for name in expected}
    return [name for name, stack in expected.items() if not is_sharded(stack, shards[name])]


def is_sharded(whole: torch.Tensor, shards: list[torch.Tensor]) -> bool:
    """Whether every shard is the whole, or all are its rows or columns."""
    if all(shard.shape == whole.shape for shard in shards):
        return all(torch.equal(shard, whole) for shard in shards)
    dim = 0 if shards[0].shape[1] == whole.shape[1] else 1
    return torch.equal(torch.cat(shards, dim), whole)


def sync_twice_in_flight(trainer: Trainer) -> list[InFlight]:
    """Requests that two syncs meet half way."""
    pool, model, first = trainer.pool, trainer.model, trainer.version
    models = {first: copy.deepcopy(model)}
    for version in (first + 1, first + 2):
        train(model, seed=version, steps=1)
        models[version] = copy.deepcopy(model)
    trainer.pace(STEP_S)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.generate, PROMPTS[:2], LONG)
        for version in (first + 1, first + 2):
            time.sleep(0.2)
            # Others that are sent later have been answered: these are on their way.
            pool.generate(PROMPTS[2:], SHORT)
            model.load_state_dict(models[version].state_dict())
            trainer.sync()
        groups = running.result()
    return [around_first_cut(models, prompt, sample) for prompt, (sample,) in zip(PROMPTS[:2], groups, strict=True)]


def around_first_cut(models: dict[int, Any], prompt: list[int], sample: rollcast.Completion) -> InFlight:
    differences = distances(models[sample.spans[0][0]], prompt, sample)
    end = sample.spans[1][1] if len(sample.spans) > 1 else len(sample.token_ids)
    return InFlight(
        versions=[version for version, _ in sample.spans],
        before=differences[:end].max().item(),
        behind=differences[end : end + 20].tolist(),
    )
