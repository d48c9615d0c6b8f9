"""Fingerprints of a worker's weights: live tensors, and what packed linears compute (vLLM worker process)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from rollcast.comm import VerifyError
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.landing.model_tensors import Tensors, model_tensors
from rollcast.rollout.landing.vllm_reload import live_tensors, probe

SHOWN_NAMES = 10


def fingerprint_64bit(model: nn.Module) -> dict[str, int]:
    """Return a 64-bit checksum of every tensor of the model by its name, computed on its device."""
    tensors = model_tensors(model) | _probes(model)
    return {name: int(checksum(flat_bytes(tensor))) for name, tensor in tensors.items()}


def fingerprint_sha256(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of every live parameter and buffer by vLLM's name: any other program can compute it, too."""
    return {name: _sha256(tensor) for name, tensor in (live_tensors(model) | _probes(model)).items()}


def raise_if_changed(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raise `VerifyError` naming the tensors whose checksums differ."""
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        shown = ", ".join(changed[:SHOWN_NAMES]) + (", ..." if len(changed) > SHOWN_NAMES else "")
        raise VerifyError(
            f"self-test: {len(changed)} of {len(before)} tensors changed in a sync that should change nothing: "
            f"{shown}. Either the trainer did not start from the engine's checkpoint, or weights land in wrong places"
        )


def _probes(model: nn.Module) -> Tensors:
    """Return what packed linears compute of a fixed input."""
    probes = {f"{path} (computed)": probe(module) for path, module in model.named_modules()}
    return {name: output for name, output in probes.items() if output is not None}


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(flat_bytes(tensor).cpu().numpy().tobytes()).hexdigest()
