"""Syncs into an engine of two workers that are to fail, or that meet moved weights (every trainer rank)."""

from collections.abc import Callable
from typing import Any

import torch
from models import build
from states import Outcome, engine_state, sync_problem
from trainer import Trainer

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Weights = dict[str, torch.Tensor]
MISTAKES: dict[str, Callable[[Weights], Any]] = {
    "missing": lambda weights: weights.pop(K_PROJ),
    "extra": lambda weights: weights.update({"model.odd.weight": torch.ones(3)}),
    "another shape": lambda weights: weights.update({K_PROJ: torch.ones(64, 63)}),
    "another kind": lambda weights: weights.update({K_PROJ: torch.ones(64, 64, dtype=torch.int64)}),
}


def sync_mistake(trainer: Trainer, mistake: str) -> Outcome:
    """Sync weights that are not those of the engines' model. Collective."""
    weights = {name: tensor.detach() for name, tensor in build("tied").named_parameters()}
    MISTAKES[mistake](weights)
    problem = sync_problem(lambda: trainer.open_broadcaster(weights).sync(version=trainer.version + 1))
    return Outcome(problem=problem, state=engine_state(trainer), fingerprints=trainer.pool.fingerprints())
