"""Lands an adapter in vLLM's slots and compares with what vLLM's own loader puts there (in landing_server.py).

A case is an architecture; ARCHITECTURE@2 means both ranks of two, +sharded vLLM's fully sharded adapters.
"""

from pathlib import Path
from typing import Any

import torch
from architectures import MOE, build
from loaded_models import LoadedModels
from peft import LoraConfig, get_peft_model
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from rollcast.comm import WeightSource, open_source
from rollcast.rollout.landing.lora import AdapterLanding, compile_adapter, register_adapters, stacks

VERSIONS = 3
# vLLM's settings for the models that adapters land in.
SETTINGS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": VERSIONS}
# peft adapts the experts of a mixture in a form of its own.
TARGETS = {MOE: ["q_proj", "v_proj", "o_proj"]}


def compare(models: LoadedModels, case: str, folder: Path) -> dict[str, Any]:
    """Return the number of moves, and the stacks that differ from what vLLM loads."""
    name, *tags = case.split("+")
    architecture, _, size = name.partition("@")
    model = build(architecture, seed=0)
    model.save_pretrained(folder / "base")
    adapter = LoraConfig(
        r=5,
        lora_alpha=8,
        target_modules=TARGETS.get(architecture, "all-linear"),
        rank_pattern={"o_proj": 2, "c_proj": 7},
    )
    model = get_peft_model(model, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(str(folder / "adapter"))
    source = open_source(model, adapters=True)
    models = models.with_settings(fully_sharded_loras="sharded" in tags)
    ranks = [_compare_rank(models, folder, source, rank, int(size or 1)) for rank in range(int(size or 1))]
    different = [name for rank in ranks for name in rank["different"]]
    return {"case": case, "moves": sum(rank["moves"] for rank in ranks), "different": different}


def _compare_rank(models: LoadedModels, folder: Path, source: WeightSource, rank: int, size: int) -> dict[str, Any]:
    """Compare slot 2 as landed with slot 0 as loaded by vLLM; the other slots must stay what they were."""
    model: Any = models.load(folder / "base", rank=rank, size=size)
    with models.as_rank(folder / "base", rank=rank, size=size) as config, torch.no_grad():
        manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        model = manager.create_lora_manager(model, config)
        assert manager.add_adapter(LoRARequest("own", 9, str(folder / "adapter")))
        expected = {name: stack[:1].clone() for name, stack in stacks(model).items()}
        model.lora_manager.remove_adapter(9)
        register_adapters(model, versions=VERSIONS)
        before = {name: stack.clone() for name, stack in stacks(model).items()}
        plan = compile_adapter(model, source.manifest)
        assert plan.check() == []
        landing = AdapterLanding(plan, model)
        landing.slot = 2
        landing.begin()
        tensors = {param: tensor for param, (tensor,) in source.gather(range(len(source.manifest.specs)))}
        for move in plan.moves:
            move.region.view(landing.live(move.target)).copy_(move.source.view(tensors[move.param].contiguous()))
        untouched = all(torch.equal(stack, before[name]) for name, stack in stacks(model).items())
        landing.commit()
    different = [] if untouched else ["touched before the commit"]
    for name, stack in stacks(model).items():
        if not torch.equal(stack[2:], expected[name]) or not torch.equal(stack[:2], before[name][:2]):
            different.append(name)
    return {"moves": len(plan.moves), "different": different}
