"""Tiny peft models, and a few training steps for their adapters."""

from typing import Any

import torch
from models import build
from peft import LoraConfig, get_peft_model

# Two of the three that vLLM fuses into qkv_proj; all of gate_up_proj; layers that it shards by rows.
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
RANK = 10
PROMPTS = [[5, 6, 7], [9, 8, 3, 2], list(range(2, 40)) * 8]


def adapted(base: Any = None, **settings: Any) -> Any:
    """Return a peft model of `base` (random by default) with an untrained adapter; `settings` are for `LoraConfig`."""
    base = build("untied") if base is None else base
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "target_modules": list(TARGETS)}
    return get_peft_model(base, LoraConfig(**defaults | settings))


def train(model: Any, *, seed: int, steps: int = 3) -> None:
    """Train on random tokens for some steps: A and B change, the base weights do not."""
    torch.manual_seed(seed)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.03)
    for _ in range(steps):
        tokens = torch.randint(2, 48, (4, 32))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
