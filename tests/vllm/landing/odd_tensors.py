"""Gives vLLM's models tensors that come from weights without being loaded, and compares syncs with fresh loads.

Runs in landing_server.py. A case changes vLLM's classes while its models are built, loaded and used once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from architecture_matrix import different, dtype_of, on_wire, save_as, snapshot
from architectures import build, perturb
from loaded_models import LoadedModels
from local_transfer import LocalTransfer
from vllm import _custom_ops
from vllm.model_executor.models.qwen2_moe import Qwen2MoeSparseMoeBlock
from vllm.model_executor.models.qwen3 import Qwen3Attention

from rollcast.comm import VerifyError, WeightSource
from rollcast.rollout.landing.apply import LiveLanding
from rollcast.rollout.landing.compiler import compile_landing
from rollcast.rollout.landing.model_tensors import model_tensors
from rollcast.rollout.worker.fingerprint import fingerprint_64bit, raise_if_changed

Context = AbstractContextManager[Any]


def after(owner: Any, method: str, act: Callable[[Any], None]) -> Callable[[], Context]:
    """Return what makes a patch that calls `act` with the object after each call of a method."""
    original = getattr(owner, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = original(self, *args, **kwargs)
        act(self)
        return outcome

    return lambda: patch.object(owner, method, call)


@contextmanager
def packed_convolution() -> Iterator[None]:
    """What vLLM does on CPUs with AVX512-BF16: another layout, in other memory than the mixer's `conv_weights`."""

    def pack(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(-1, 2, 2).permute(1, 2, 0).contiguous()

    with (
        patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: True),
        patch.object(_custom_ops, "causal_conv1d_weight_pack", pack),
    ):
        yield


def keep_rows(attention: Any) -> None:
    attention.rows = {"of q": [attention.qkv_proj.weight.data[2:7]]}


def keep_norm(attention: Any) -> None:
    attention.norm = attention.q_norm.weight.data.view(2, -1)


def move_norm(attention: Any) -> None:
    with torch.inference_mode(False):
        attention.q_norm.weight.data = attention.q_norm.weight.data.clone()


def keep_double(attention: Any) -> None:
    if not hasattr(attention.q_norm, "doubled"):
        attention.q_norm.doubled = attention.q_norm.weight.data * 2


def add_table(attention: Any) -> None:
    attention.q_norm.register_buffer("table", torch.zeros(attention.q_norm.weight.shape), persistent=False)


def fill_table(attention: Any) -> None:
    attention.q_norm.table.copy_(attention.q_norm.weight.data.cumsum(0))


def fuse_gates(block: Any) -> None:
    """Do what the runner does in its first forward pass where it has both gates."""
    runner = block.experts
    vars(runner).update(gate=block.gate, shared_expert_gate=block.shared_expert_gate)
    runner._maybe_fuse_gate_weights()


# Name: a case of the matrix, what is patched while models are built and loaded, and while they are used.
Patches = tuple[str, Callable[[], Context], Callable[[], Context]]
CASES: dict[str, Patches] = {
    "nothing": ("qwen3", nullcontext, nullcontext),
    "packed convolution": ("mamba2+bf16", packed_convolution, nullcontext),
    "view of a weight": ("qwen3", after(Qwen3Attention, "__init__", keep_rows), nullcontext),
    "weight moved in a forward pass": (
        "qwen3",
        after(Qwen3Attention, "__init__", keep_norm),
        after(Qwen3Attention, "forward", move_norm),
    ),
    "new in a forward pass": ("qwen3", nullcontext, after(Qwen3Attention, "forward", keep_double)),
    "changed in a forward pass": (
        "qwen3",
        after(Qwen3Attention, "__init__", add_table),
        after(Qwen3Attention, "forward", fill_table),
    ),
    "fused gates": ("qwen2_moe", nullcontext, after(Qwen2MoeSparseMoeBlock, "forward", fuse_gates)),
}


DERIVED = ("conv_weights", "of q.0", ":norm", "_gate_weight")


class OddTensors:
    """Runs the cases on models in a folder."""

    def __init__(self, models: LoadedModels, folder: Path) -> None:
        self._models = models
        self._folder = folder

    def lands(self, case: str) -> dict[str, Any]:
        """Land weights in a model of the case. Return what is wrong, and what the plan says of derived tensors."""
        name, loading, using = CASES[case]
        architecture, *tags = name.split("+")
        dtype = dtype_of(tags)
        models = self._models.with_settings(dtype=str(dtype).removeprefix("torch."))
        model = build(architecture, seed=0)
        base = save_as(architecture, model, self._folder / "base", tags)
        perturb(model)
        weights = save_as(architecture, model, self._folder / "perturbed", tags)
        with loading(), using(), models.as_rank(self._folder / "base", rank=0, size=1):
            live, fresh = (models.load(self._folder / which, used=True) for which in ("base", "perturbed"))
            before = snapshot(live)
            with torch.no_grad():
                plan = compile_landing(live, WeightSource(weights).manifest, dtype=dtype)
                row = {"problems": plan.check(), "views": len(plan.views), "recomputed": len(plan.recomputed)}
                landing = LiveLanding(plan, live, dtype=dtype)
                LocalTransfer(landing, on_wire(plan, base)).apply()
                row["changed"] = different(before, snapshot(live))
                transfer = LocalTransfer(landing, on_wire(plan, weights))
                transfer.apply()
                row["different"] = different(snapshot(fresh), snapshot(live))
                if not row["different"]:
                    row["unseen"] = self._unseen(live, transfer)
                    row["nan differs from itself"] = self._nan_fails(landing, on_wire(plan, weights))
                return row

    @staticmethod
    def _nan_fails(landing: LiveLanding, weights: list[torch.Tensor]) -> bool:
        for weight in weights:
            weight.view(-1)[0] = float("nan")
        transfer = LocalTransfer(landing, weights)
        transfer.apply()
        return _raises(lambda: transfer.apply(verifying=True))

    @staticmethod
    def _derived(model: Any) -> list[str]:
        return [name for name in model_tensors(model) if name.endswith(DERIVED)]

    def _unseen(self, model: Any, transfer: LocalTransfer) -> list[str]:
        """Damage each derived tensor; return those of which verification or self-test says nothing."""
        unseen: list[str] = []
        transfer.apply(verifying=True)
        before = fingerprint_64bit(model)
        checks = {"self-test": lambda: raise_if_changed(before, fingerprint_64bit(model))}
        if transfer.landing.plan.views or transfer.landing.plan.recomputed:
            checks["verify"] = lambda: transfer.apply(verifying=True)
        for name in self._derived(model):
            tensor = model_tensors(model)[name]
            kept = tensor.clone()
            for what, check in checks.items():
                with torch.inference_mode(tensor.is_inference()):
                    tensor.view(-1)[0] = float("nan")
                unseen += [] if _raises(check) else [f"{name} by {what}"]
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(kept)
        return unseen


def _raises(check: Callable[[], object]) -> bool:
    try:
        check()
    except VerifyError:
        return True
    return False
