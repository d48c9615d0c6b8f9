"""Land perturbed weights in vLLM's models and compare with a fresh load, one architecture after the other.

architecture_matrix.py FOLDER CASE...      (a plain process; prints one JSON object a line)

A case is an architecture; ARCHITECTURE@2 means both ranks of two, +ep expert parallel, and +memory the trainer's
names in memory rather than those of its checkpoint. The layout of CPU weights is the environment's.
No engine: vLLM's model, built and loaded by vLLM, is what an engine's worker has.
"""

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import torch
from architectures import MOE, build, perturb
from safetensors.torch import load_file

from rollcast.comm import WeightSource
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.offline import OfflineModels
from rollcast.rollout.landing.plan import LandingPlan
from rollcast.rollout.landing.vllm_reload import choose_cpu_layout, live_tensors, probe

Tensors = dict[str, torch.Tensor]


def main() -> None:
    folder = Path(sys.argv[1])
    models = prepare(folder / "first")
    for case in sys.argv[2:]:
        start = time.monotonic()
        try:
            row = compare(models, case, folder / case)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        shutil.rmtree(folder / case, ignore_errors=True)
        print(json.dumps({"case": case, "seconds": round(time.monotonic() - start, 2)} | row), flush=True)


def prepare(folder: Path) -> OfflineModels:
    from vllm.model_executor.models import registry

    # What vLLM's CPU worker does: there is no accelerator whose cache could be emptied.
    torch.accelerator.empty_cache = lambda: None
    choose_cpu_layout()
    # vLLM looks at each new model class in another process, to keep this one off the GPU: 10 s each.
    registry._run_in_subprocess = lambda look: look()
    # vLLM makes an expert parallel group only for a model with experts.
    build(MOE, seed=0).save_pretrained(folder)
    return OfflineModels(folder, dtype="float32", max_model_len=64)


def compare(models: OfflineModels, case: str, folder: Path) -> dict[str, Any]:
    name, *tags = case.split("+")
    architecture, _, size = name.partition("@")
    model = build(architecture, seed=0)
    base = save(model, folder / "base", "memory" in tags)
    perturb(model)
    perturbed = save(model, folder / "perturbed", "memory" in tags)
    place = {"size": int(size or 1), "enable_expert_parallel": "ep" in tags}
    one = partial(compare_rank, models, folder, base, perturbed)
    ranks: list[dict[str, Any]] = [one(rank=rank, **place) for rank in range(place["size"])]
    unused = [set(rank.pop("unused")) for rank in ranks]
    facts: dict[str, Any] = {"model": [rank.pop("model") for rank in ranks].pop(), "parameters": len(base)}
    facts |= {key: sum((rank[key] for rank in ranks), type(value)()) for key, value in ranks[-1].items()}
    everywhere = set.intersection(*unused)
    return facts | {"unused": sorted(everywhere), "remote": sorted(set.union(*unused) - everywhere)}


def save(model: Any, folder: Path, memory: bool) -> Tensors:
    """What the trainer would send: the tensors of the checkpoint that it writes, or those of the model."""
    model.save_pretrained(folder)
    if memory:
        return {spec.name: tensor.detach().clone() for spec, tensor in WeightSource(model)}
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def compare_rank(
    models: OfflineModels, folder: Path, base: Tensors, perturbed: Tensors, **place: Any
) -> dict[str, Any]:
    updated, fresh = (models.load(folder / which, **place) for which in ("base", "perturbed"))
    before, expected = snapshot(updated), snapshot(fresh)
    manifest = WeightSource(perturbed).manifest
    with models.as_rank(folder / "base", **place), torch.no_grad():
        start = time.perf_counter()
        plan = compile_landing(updated, manifest, dtype=torch.float32)
        compile_ms = round((time.perf_counter() - start) * 1000)
        undisturbed = different(before, snapshot(updated))
        landing = LiveLanding(plan, updated, dtype=torch.float32)
        landing.bind(list(base.values())).apply()
        changed = different(before, snapshot(updated))
        landing.bind(list(perturbed.values())).apply()
    stale = different(before, expected)
    return {
        "model": type(updated).__name__,
        "moves": len(plan.moves),
        "zero_copy": sum(move.in_place for move in plan.moves),
        "stages": len(plan.stages),
        "tapes": sum(bool(stage.tape) for stage in plan.stages),
        "attention": len(plan.attention),
        "compile_ms": compile_ms,
        "problems": plan.check(),
        "unused": [manifest.specs[index].name for index in plan.unused],
        "stale_before": len(stale),
        "untested": sorted({move.target for move in plan.moves if move.stage is None} - set(stale)),
        "changed_by_compiling": undisturbed,
        "changed_by_same_weights": changed,
        "different": different(expected, snapshot(updated)),
        "moved": [moved] if (moved := landing.moved(updated)) else [],
        "lossy": [] if LandingPlan.from_bytes(plan.to_bytes()).digest == plan.digest else ["plan"],
    }


def snapshot(model: Any) -> Tensors:
    """Every tensor of a model, those in plain attributes too, and what packed linears make of a fixed input."""
    found = {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}
    for path, module in model.named_modules():
        for owner in (module, getattr(module, "impl", None)):
            plain = {} if owner is None else vars(owner)
            found |= {f"{path}:{key}": value.clone() for key, value in plain.items() if isinstance(value, torch.Tensor)}
        if (made := probe(module)) is not None:
            found[f"{path}(probe)"] = made
    return found


def different(first: Tensors, second: Tensors) -> list[str]:
    return [name for name in first | second if not same(first.get(name), second.get(name))]


def same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return first is not None and second is not None and first.shape == second.shape and torch.equal(first, second)


if __name__ == "__main__":
    main()
