"""Land adapters in vLLM's slots and compare with what vLLM's own loader puts there (a plain process).

adapter_matrix.py FOLDER CASE...      (prints one JSON object a line)

A case is an architecture; ARCHITECTURE@2 means both ranks of two, +sharded vLLM's fully sharded adapters.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import torch
from architectures import MOE, build
from peft import LoraConfig, get_peft_model

from rollcast.comm import WeightSource, open_source
from rollcast.rollout.landing.lora import AdapterLanding, compile_adapter, register_adapters, stacks
from rollcast.rollout.landing.offline import OfflineModels

MAX_RANK = 8
VERSIONS = 3
# Of mixtures of experts, whose experts peft adapts in a form of its own.
TARGETS = {MOE: ["q_proj", "v_proj", "o_proj"]}


def main() -> None:
    from vllm.model_executor.models import registry

    folder = Path(sys.argv[1])
    # What vLLM's CPU worker does: there is no accelerator whose cache could be emptied.
    torch.accelerator.empty_cache = lambda: None
    # vLLM looks at each new model class in another process, to keep this one off the GPU: 10 s each.
    registry._run_in_subprocess = lambda look: look()
    # vLLM makes an expert parallel group only for a model with experts.
    build(MOE, seed=0).save_pretrained(folder / "first")
    models = OfflineModels(
        folder / "first",
        dtype="float32",
        max_model_len=64,
        enable_lora=True,
        max_lora_rank=MAX_RANK,
        max_loras=VERSIONS,
    )
    for case in sys.argv[2:]:
        try:
            row = compare(models, case, folder / case)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case} | row), flush=True)


def compare(models: OfflineModels, case: str, folder: Path) -> dict[str, Any]:
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
    settings = {"fully_sharded_loras": "sharded" in tags}
    ranks = [compare_rank(models, folder, source, rank, int(size or 1), settings) for rank in range(int(size or 1))]
    different = [name for its in ranks for name in its["different"]]
    return {"moves": sum(its["moves"] for its in ranks), "different": different}


def compare_rank(
    models: OfflineModels, folder: Path, source: WeightSource, rank: int, size: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Slot 2 as landed beside slot 0 as loaded by vLLM; slot 1 must stay what it was."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    model: Any = models.load(folder / "base", rank=rank, size=size, **settings)
    with models.as_rank(folder / "base", rank=rank, size=size, **settings) as config, torch.no_grad():
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
        tensors = dict(source.walk(range(len(source.manifest.specs))))
        for move in plan.moves:
            move.region.view(landing.live(move.target)).copy_(move.source.view(tensors[move.param].contiguous()))
        untouched = all(torch.equal(stack, before[name]) for name, stack in stacks(model).items())
        landing.commit()
    different = [] if untouched else ["touched before the commit"]
    for name, stack in stacks(model).items():
        if not torch.equal(stack[2:], expected[name]) or not torch.equal(stack[:2], before[name][:2]):
            different.append(name)
    return {"moves": len(plan.moves), "different": different}


if __name__ == "__main__":
    main()
