"""Syncs of a part of a model's weights, landed without an engine (in landing_server.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture_matrix import different, snapshot
from architectures import build, perturb, save
from loaded_models import LoadedModels
from local_transfer import LocalTransfer
from safetensors.torch import save_file
from shards import put_together

from rollcast.comm import Holders, WeightSource, build_transfer
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing

Row = dict[str, Any]


def land(models: LoadedModels, folder: Path, source: WeightSource, *, fresh: Path | None = None) -> Row:
    """Land what the source sends in the model of a folder, twice; compare with a load of `fresh`."""
    live = models.load(folder)
    with models.as_rank(folder, rank=0, size=1), torch.no_grad():
        plan = compile_landing(live, source.manifest, kept=source.kept, dtype=torch.float32)
        row: Row = {"problems": plan.check()}
        if row["problems"] or fresh is None:
            return row
        transfer = build_transfer(Holders.of([source.statement]), {"w": plan.moves}, ["w"], bucket_bytes=1 << 20)
        weights = put_together([source])
        landing = LiveLanding(plan, live, dtype=torch.float32)
        for _ in range(2):
            LocalTransfer(landing, [weights[spec.name] for spec in source.manifest.specs]).apply()
    row["skipped"] = [spec.name for spec in transfer.skipped]
    return row | {"sent": len(weights), "different": different(snapshot(models.load(fresh)), snapshot(live))}


def frozen(models: LoadedModels, folder: Path, *, name: str, layer: str, **options: Any) -> Row:
    """Some weights are not trained, and not sent."""
    model = build(name, seed=0)
    before = save(name, model, folder / "before")
    fixed = {path: param for path, param in model.named_parameters() if f"{layer}." in path}
    values = {path: param.detach().clone() for path, param in fixed.items()}
    perturb(model)
    source = WeightSource(model, **options)
    # What the trainer has there now must not arrive.
    after = save(name, model, folder / "after")
    with torch.no_grad():
        for path, param in fixed.items():
            param.copy_(values[path])
    after = save(name, model, folder / "after")
    perturb_only(fixed)
    return land(models, folder / "before", source, fresh=folder / "after") | {"all": len(before | after)}


def perturb_only(params: dict[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for param in params.values():
            param.add_(1)


def frozen_by_flag(models: LoadedModels, folder: Path) -> Row:
    name = "mixtral"
    model = build(name, seed=0)
    save(name, model, folder / "before")
    for param in model.model.layers[0].parameters():
        param.requires_grad_(False)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.mul_(1.01)
    save(name, model, folder / "after")
    source = WeightSource(model, keep_frozen=True)
    return land(models, folder / "before", source, fresh=folder / "after")


def text_trainer(models: LoadedModels, folder: Path, *, keep: tuple[str, ...] = ("visual",)) -> Row:
    """An engine of a model with images; the trainer has loaded its language part."""
    whole = build("qwen3_5-images", seed=0)
    whole.save_pretrained(folder / "before")
    text: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "before", dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in text.state_dict().items():
            tensor.mul_(1.01)
            whole.state_dict()[name.replace("model.", "model.language_model.", 1)].copy_(tensor)
    whole.save_pretrained(folder / "after")
    return land(models, folder / "before", WeightSource(text, keep=keep), fresh=folder / "after")


def images_switched_off(models: LoadedModels, folder: Path) -> Row:
    model = build("qwen3_vl", seed=0)
    save("qwen3_vl", model, folder / "before")
    perturb(model)
    save("qwen3_vl", model, folder / "after")
    models = models.with_settings(limit_mm_per_prompt={"image": 0, "video": 0})
    return land(models, folder / "before", WeightSource(model), fresh=folder / "after")


def extra_prediction_layer(models: LoadedModels, folder: Path) -> Row:
    """A layer that predicts further tokens, which vLLM's model does not have."""
    model = build("deepseek_v3", seed=0)
    tensors = save("deepseek_v3", model, folder)
    tensors |= {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return land(models, folder, WeightSource(tensors), fresh=folder)


def layer(**options: Any) -> Callable[[LoadedModels, Path], Row]:
    return lambda models, folder: frozen(models, folder, **options)


CASES: dict[str, Callable[[LoadedModels, Path], Row]] = {
    "layer": layer(name="qwen3_moe", layer="layers.0", keep=["layers.0"]),
    "embedding": layer(name="llama", layer="embed_tokens", keep=["model.embed_tokens"]),
    "tied embedding": layer(name="llama-tied", layer="embed_tokens", keep=["embed_tokens"]),
    "attention": layer(name="deepseek_v3", layer="self_attn", keep=["layers.?.self_attn"]),
    "half of a module": layer(name="llama", layer="k_proj", keep=["k_proj"]),
    "requires_grad": frozen_by_flag,
    "text trainer": text_trainer,
    "text trainer, nothing said": lambda models, folder: text_trainer(models, folder, keep=()),
    "images switched off": images_switched_off,
    "extra prediction layer": extra_prediction_layer,
}
