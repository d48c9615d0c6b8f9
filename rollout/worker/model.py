"""The model of a vLLM worker: how to reach it, and how a trainer's weights land in it (vLLM worker process)."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rollcast.comm import Kept, Manifest
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing import LandingPlan
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.lora import AdapterLanding, compile_adapter, is_lora_manifest, register_adapters

SHOWN_PROBLEMS = 10


class WorkerModel:
    """The model that a vLLM worker runs. Nothing of it is kept here: vLLM may replace modules and tensors."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._kept = Kept()

    @property
    def module(self) -> nn.Module:
        """The model's root module."""
        return self._worker.model_runner.get_model()

    @property
    def has_lora(self) -> bool:
        """Whether vLLM runs with `enable_lora`."""
        return self._worker.vllm_config.lora_config is not None

    def vllm_config(self) -> AbstractContextManager[None]:
        """Make the engine's configuration the current one: vLLM's loaders and kernels read it there."""
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self._worker.vllm_config)

    def register_adapters(self, versions: int) -> None:
        """Fill vLLM's first `versions` LoRA slots with adapters of zeros."""
        register_adapters(self.module, versions=versions)

    def raise_if_unsupported(self) -> None:
        """Raise `LandingError` for settings under which vLLM moves or renames weights while it runs."""
        if getattr(self._worker.vllm_config.parallel_config, "enable_eplb", False):
            raise LandingError("expert load balancing moves experts between workers: set enable_eplb to False")

    def plan(self, manifest: Manifest, kept: Kept) -> LandingPlan:
        """Compile the landing plan and check it. Collective over the engine's workers.

        The trainers send `manifest`; the model keeps `kept`. Raises `LandingError` naming the parameters that it cannot
        take.
        """
        self._raise_if_other_kind(manifest)
        self._kept = kept
        plan = self.compile(manifest)
        if problems := plan.check():
            shown = "\n  ".join(problems[:SHOWN_PROBLEMS]) + ("\n  ..." if len(problems) > SHOWN_PROBLEMS else "")
            raise LandingError(f"the trainer's weights do not fit the engine's model:\n  {shown}")
        return plan

    def compile(self, manifest: Manifest) -> LandingPlan:
        """Compile the landing plan; `plan` has set what is kept. Collective over the engine's workers."""
        with self.vllm_config():
            if self.has_lora:
                return compile_adapter(self.module, manifest)
            return compile_landing(self.module, manifest, kept=self._kept, dtype=self._dtype)

    def land(self, plan: LandingPlan) -> LiveLanding | AdapterLanding:
        """Bind a plan to the tensors that are live now."""
        if self.has_lora:
            return AdapterLanding(plan, self.module)
        return LiveLanding(plan, self.module, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self._worker.model_config.dtype

    def _raise_if_other_kind(self, manifest: Manifest) -> None:
        """Raise `LandingError` for full weights with LoRA, and for an adapter without."""
        is_adapter = is_lora_manifest(manifest)
        if self.has_lora and not is_adapter:
            raise LandingError(
                "an engine with enable_lora wraps its layers, and full weights cannot be synced into it: set lora_rank "
                "and send a peft model's adapter, or start the engines without LoRA"
            )
        if is_adapter and not self.has_lora:
            raise LandingError("an engine without LoRA takes no adapters: start the engines with lora_rank")
