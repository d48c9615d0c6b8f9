"""vLLM's models with their weights, without an engine: what landings are compared with (benchmarks and tests)."""

import copy
from pathlib import Path
from typing import Any, Self

import torch

from rollcast.rollout.landing.offline import OfflineModels

TOKENS = 4


class LoadedModels(OfflineModels):
    """Loads vLLM's models, where `OfflineModels` only builds them.

    models = LoadedModels(any_model_folder)
    model = models.load(folder, rank=1, size=2)            # as an engine's worker has it
    model = models.with_settings(enable_lora=True).load(folder)
    """

    def with_settings(self, **settings: Any) -> Self:
        """Return the same with further settings of vLLM's."""
        models = copy.copy(self)
        models._settings = self._settings | settings
        return models

    def load(self, folder: str | Path, *, rank: int = 0, size: int = 1, used: bool = False) -> Any:
        """Return the model with the folder's weights, processed as in an engine.

        With `used`, after a forward pass without a cache, as an engine makes one before it serves.
        """
        from vllm.model_executor.model_loader import get_model

        with self.as_rank(folder, rank=rank, size=size) as config:
            model = get_model(vllm_config=config)
            if used:
                use_once(model, config)
        return model


def use_once(model: Any, config: Any) -> None:
    """Make the forward pass by which an engine measures its memory: of a few tokens, without a cache."""
    from vllm.forward_context import set_forward_context

    tokens = torch.arange(TOKENS)
    with torch.inference_mode(), set_forward_context(None, config, num_tokens=TOKENS):
        model(tokens, tokens)
