"""Tiny random models of many architectures. A new one is one line in `ARCHITECTURES`."""

from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GROUPED = COMMON | {"num_attention_heads": 4, "head_dim": 32}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}

# name: transformers' config class, its settings
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereConfig", COMMON),
    "exaone4": ("Exaone4Config", GROUPED),
    "gemma": ("GemmaConfig", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED),
    "gemma3": ("Gemma3TextConfig", GROUPED),
    "glm4": ("Glm4Config", GROUPED),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 16}),
    "granite": ("GraniteConfig", COMMON),
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "mistral-sliding": ("MistralConfig", GROUPED | {"sliding_window": 32}),
    "nemotron": ("NemotronConfig", GROUPED),
    "olmo2": ("Olmo2Config", COMMON),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi3-fused": ("Phi3Config", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "qwen3-tied": ("Qwen3Config", GROUPED | {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", COMMON),
    "stablelm": ("StableLmConfig", COMMON),
    "starcoder2": ("Starcoder2Config", COMMON),
}
# What cannot land in place yet, and the words that say so.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 2}, "part of a copy"),
    "falcon": (
        "FalconConfig",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "query_key_value.weight .*: the loader computes the value",
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "mixer.A_log .*: the loader computes the value",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "experts.*transforms its weights after loading",
    ),
}


def build(config_class: str, settings: dict[str, Any], *, seed: int) -> Any:
    """A random float32 model."""
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def perturb(model: torch.nn.Module) -> None:
    """Change every element of every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01).add_(torch.randn_like(parameter), alpha=0.01)
