"""What a worker's weights are, in a few bytes: live tensors, and what packed linears compute (worker)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from rollcast.comm import VerifyError
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.landing.vllm_reload import Tensors, live_tensors, probe

SHOWN = 10


def hashes(model: nn.Module) -> dict[str, int]:
    """A 64-bit hash of every live parameter and buffer, made on its device, by vLLM's name."""
    return {name: int(checksum(flat_bytes(tensor))) for name, tensor in _tensors(model).items()}


def fingerprints(model: nn.Module) -> dict[str, str]:
    """The same as SHA-256, which anyone can compute."""
    return {name: _sha256(tensor) for name, tensor in _tensors(model).items()}


def raise_if_changed(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raise `VerifyError` naming the tensors whose hashes differ."""
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        shown = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise VerifyError(
            f"self-test: {len(changed)} of {len(before)} tensors changed in a sync that should change nothing: "
            f"{shown}. Either the trainer did not start from the engine's checkpoint, or weights land in wrong places"
        )


def _tensors(model: nn.Module) -> Tensors:
    probes = {f"{path} (computed)": probe(module) for path, module in model.named_modules()}
    return live_tensors(model) | {name: made for name, made in probes.items() if made is not None}


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(flat_bytes(tensor).cpu().numpy().tobytes()).hexdigest()
