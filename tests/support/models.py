"""Tiny models with random weights for test jobs."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

PROMPTS = [[5, 6, 7], [9, 8], [3, 4, 5, 6]]

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "dtype": torch.float32,
}


def build(kind: str, *, seed: int = 0, **sizes: Any) -> Any:
    """Return a Qwen3 with tied embeddings ("tied"), or a Llama without ("untied")."""
    torch.manual_seed(seed)
    if kind == "tied":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES | sizes, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes, tie_word_embeddings=False))


def perturb(model: torch.nn.Module, *, seed: int) -> None:
    """Change every weight, the same way on every rank and however it is sharded."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.mul_(1.0 + 0.01 * (seed + index % 7)).add_(0.001 * (index % 5))
