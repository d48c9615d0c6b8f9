"""Lands perturbed weights in vLLM's model of an architecture and compares with a fresh load (in landing_server.py).

A case is an architecture; ARCHITECTURE@2 means both ranks of two, +ep expert parallel, and +memory what is sent of the
model in memory rather than of its checkpoint. +bf16 and +fp16 are what checkpoint, trainer and engine are in, and
+masters gives the trainer float32 in their place.
"""

import copy
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from architectures import DTYPES, FLOAT32_ISLANDS, NOT_USED, ROUTERS, build, in_half, perturb, save
from loaded_models import LoadedModels
from local_transfer import LocalTransfer
from shards import put_together

from rollcast.comm import WeightSource
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.landing import LandingPlan
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.model_tensors import model_tensors
from rollcast.rollout.landing.vllm_reload import probe

Tensors = dict[str, torch.Tensor]


def compare(models: LoadedModels, case: str, folder: Path) -> dict[str, Any]:
    """Return the facts of a case, and "error" if it raised. `folder` is for the case's models and is removed."""
    start = time.monotonic()
    try:
        row = _compare(models, case, folder)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"case": case, "seconds": round(time.monotonic() - start, 2)} | row


def dtype_of(tags: Sequence[str]) -> torch.dtype:
    """Return the engine's dtype."""
    return next((DTYPES[tag] for tag in tags if tag in DTYPES), torch.float32)


def save_as(name: str, model: Any, folder: Path, tags: Sequence[str]) -> Tensors:
    """Save the model; return what its trainer would send: the tensors of the checkpoint, or those in memory."""
    kept = model
    islands = FLOAT32_ISLANDS + (ROUTERS if "masters" in tags else ())
    if (dtype := dtype_of(tags)) != torch.float32:
        kept = in_half(copy.deepcopy(model), dtype, kept=islands)
    tensors = save(name, kept, folder)
    trained = model if "masters" in tags else kept
    if "memory" in tags:
        return put_together([WeightSource(trained)])
    return tensors if trained is kept else save(name, trained, folder / "masters")


def snapshot(model: Any) -> Tensors:
    """Copy every tensor of a model, wherever it keeps it, and what packed linears compute of a fixed input."""
    tensors = {name: tensor.detach().clone() for name, tensor in model_tensors(model).items()}
    probes = {f"{path}(probe)": probe(module) for path, module in model.named_modules()}
    return tensors | {name: output for name, output in probes.items() if output is not None}


def on_wire(plan: LandingPlan, weights: Tensors) -> list[torch.Tensor]:
    """Return the trainer's tensors in the dtypes in which they travel."""
    pairs = zip(plan.manifest.specs, weights.values(), strict=True)
    return [tensor.to(spec.dtype).contiguous() for spec, tensor in pairs]


def different(first: Tensors, second: Tensors) -> list[str]:
    """Return the names of tensors that differ in shape, dtype or bytes, or that only one side has."""
    return [name for name in first | second if not _same(first.get(name), second.get(name))]


def _compare(models: LoadedModels, case: str, folder: Path) -> dict[str, Any]:
    name, *tags = case.split("+")
    architecture, _, size = name.partition("@")
    model = build(architecture, seed=0)
    base = save_as(architecture, model, folder / "base", tags)
    perturb(model)
    perturbed = save_as(architecture, model, folder / "perturbed", tags)
    dtype = dtype_of(tags)
    settings = {"dtype": str(dtype).removeprefix("torch."), "enable_expert_parallel": "ep" in tags}
    models = models.with_settings(**settings)
    one = partial(_compare_rank, models, folder, base, perturbed, dtype=dtype, size=int(size or 1))
    # A rank without its peers cannot make a forward pass.
    one = partial(one, used=not size and architecture not in NOT_USED)
    ranks: list[dict[str, Any]] = [one(rank=rank) for rank in range(int(size or 1))]
    unused = [set(rank.pop("unused")) for rank in ranks]
    facts: dict[str, Any] = {"model": [rank.pop("model") for rank in ranks].pop(), "parameters": len(base)}
    facts |= {key: sum((rank[key] for rank in ranks), type(value)()) for key, value in ranks[-1].items()}
    everywhere = set.intersection(*unused)
    return facts | {"unused": sorted(everywhere), "remote": sorted(set.union(*unused) - everywhere)}


def _compare_rank(
    models: LoadedModels,
    folder: Path,
    base: Tensors,
    perturbed: Tensors,
    *,
    dtype: torch.dtype,
    rank: int,
    size: int,
    used: bool,
) -> dict[str, Any]:
    updated, fresh = (models.load(folder / which, rank=rank, size=size, used=used) for which in ("base", "perturbed"))
    before, expected = snapshot(updated), snapshot(fresh)
    manifest = WeightSource(perturbed).manifest
    with models.as_rank(folder / "base", rank=rank, size=size), torch.no_grad():
        start = time.perf_counter()
        plan = compile_landing(updated, manifest, dtype=dtype)
        compile_ms = round((time.perf_counter() - start) * 1000)
        undisturbed = different(before, snapshot(updated))
        landing = LiveLanding(plan, updated, dtype=dtype)
        LocalTransfer(landing, on_wire(plan, base)).apply()
        changed = different(before, snapshot(updated))
        LocalTransfer(landing, on_wire(plan, perturbed)).apply()
    stale = different(before, expected)
    return {
        "model": type(updated).__name__,
        "moves": len(plan.moves),
        "zero_copy": sum(move.in_place for move in plan.moves),
        "stages": len(plan.stages),
        "tapes": sum(bool(stage.tape) for stage in plan.stages),
        "derived": len(plan.attention) + len(plan.views) + len(plan.recomputed),
        "compile_ms": compile_ms,
        "float32": sorted({spec.name for spec in plan.manifest.specs if spec.dtype == torch.float32 != dtype}),
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


def _same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    # Bytes: a NaN is what it is.
    return torch.equal(flat_bytes(first), flat_bytes(second))
