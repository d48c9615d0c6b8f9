"""Model shapes of the latency benchmark: a config folder for the engine, random weights for the trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rollcast.comm import Manifest, ParamSpec
from rollcast.rollout.landing.offline import checkpoint_manifest

STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A model's architecture, without weights."""

    config_class: str
    settings: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16


QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
TINY = {"vocab_size": 1024, "head_dim": 32, "num_key_value_heads": 2, "max_position_embeddings": 16384}
TINY |= {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def _dense(hidden: int, intermediate: int, layers: int, heads: int, tied: dict[str, Any]) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return Shape("Qwen3Config", QWEN3 | sizes | {"num_attention_heads": heads} | tied)


MOE_30B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
MOE_30B |= {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

SHAPES = {
    "tiny": Shape("Qwen3Config", TINY | UNTIED, torch.float32),
    "tiny-bf16": Shape("Qwen3Config", TINY | UNTIED),
    "tiny-moe": Shape("Qwen3MoeConfig", TINY | TINY_EXPERTS | UNTIED, torch.float32),
    "qwen3-0.6b": _dense(1024, 3072, 28, 16, TIED),
    "qwen3-4b": _dense(2560, 9728, 36, 32, TIED),
    "qwen3-8b": _dense(4096, 12288, 36, 32, UNTIED),
    "qwen3-32b": _dense(5120, 25600, 64, 64, UNTIED),
    "qwen3-30b-a3b": Shape("Qwen3MoeConfig", QWEN3 | MOE_30B | {"norm_topk_prob": True} | UNTIED),
}


def write_config(name: str, folder: Path) -> None:
    """Write the config folder that the engine starts from."""
    import transformers

    shape = SHAPES[name]
    architectures = [shape.config_class.replace("Config", "ForCausalLM")]
    config = getattr(transformers, shape.config_class)(**shape.settings, dtype=shape.dtype, architectures=architectures)
    config.save_pretrained(folder)


def manifest_of(folder: str | Path) -> Manifest:
    """Return the parameters that a trainer of the folder's model sends."""
    return with_single_experts(checkpoint_manifest(folder))


def random_weights(manifest: Manifest, *, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random tensors on the device, each in a memory block of its own, as a trainer has them."""
    torch.manual_seed(0)
    return {
        spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=device).normal_(std=STD) for spec in manifest.specs
    }


def with_single_experts(manifest: Manifest) -> Manifest:
    """Split the experts of each layer, which transformers holds as one tensor, into the checkpoint's parameters."""
    specs: list[ParamSpec] = []
    for spec in manifest.specs:
        stem, _, kind = spec.name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not stem.endswith("experts"):
            specs.append(spec)
            continue
        experts, rows, columns = spec.shape
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        specs += [
            ParamSpec(f"{stem}.{expert}.{part}.weight", (rows // len(parts), columns), spec.dtype)
            for expert in range(experts)
            for part in parts
        ]
    return Manifest(tuple(specs))
