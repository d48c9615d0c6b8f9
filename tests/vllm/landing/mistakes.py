"""What is said of weights that vLLM's loader does not take (in landing_server.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import build, save
from loaded_models import LoadedModels

from rollcast.comm import WeightSource
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.compiler import compile_landing


def resized(model: Any) -> Any:
    model.resize_token_embeddings(104)
    return model


def packed(model: Any) -> Any:
    """As 4-bit weights are packed: two in a byte."""
    return {
        name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8) if "_proj" in name else tensor
        for name, tensor in model.state_dict().items()
    }


def inside(model: Any) -> Any:
    return {f"actor.{name}": tensor for name, tensor in model.state_dict().items()}


def reshaped(model: Any) -> Any:
    state = model.state_dict()
    return state | {"model.layers.0.self_attn.o_proj.weight": torch.zeros(64, 5)}


CASES: dict[str, Callable[[Any], Any]] = {f.__name__: f for f in (resized, packed, inside, reshaped)}


def refusal(models: LoadedModels, case: str, folder: Path) -> dict[str, Any]:
    """The text of the refusal of a mistake with a tiny Qwen3."""
    model = build("qwen3", seed=0)
    save("qwen3", model, folder)
    live = models.load(folder)
    with models.as_rank(folder, rank=0, size=1), torch.no_grad():
        try:
            plan = compile_landing(live, WeightSource(CASES[case](model)).manifest, dtype=torch.float32)
        except LandingError as error:
            return {"text": str(error)}
    return {"text": "; ".join(plan.check())}
