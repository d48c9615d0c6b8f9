"""The same weights, held by two trainer ranks in every layout that trainers have (every trainer rank)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import PROMPTS, build, perturb
from oracle import greedy_tokens
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from trainer import Trainer

import rollcast.rollout as rollcast
from rollcast.comm import Holding

Weights = Any


@dataclass(frozen=True, kw_only=True)
class Landed:
    """What the engine has after a sync, and what transformers makes of the same weights."""

    fingerprints: list[list[dict[str, str]]]
    tokens: list[list[int]]
    expected: list[list[int]]
    gathered_s: float
    """Seconds of the sync's phase "gather"."""


def sync_layout(trainer: Trainer, layout: str, seed: int) -> Landed:
    """Sync new weights twice, verified; the second time from the same memory with other values. Collective."""
    plain, held = build("tied"), build("tied")
    weights, refresh = LAYOUTS[layout](held, trainer)
    broadcaster = trainer.open_broadcaster(weights)
    for change in (seed, seed + 1):
        perturb(plain, seed=change)
        refresh(change)
        report = broadcaster.sync(version=broadcaster.version + 1, verify="full")
    greedy = trainer.pool.generate(PROMPTS, rollcast.Sampling(temperature=0.0, max_tokens=12, ignore_eos=True))
    return Landed(
        fingerprints=trainer.pool.fingerprints(),
        tokens=[samples[0].token_ids for samples in greedy],
        expected=[greedy_tokens(plain, prompt, 12) for prompt in PROMPTS],
        gathered_s=report.phases_s.get("gather", 0.0),
    )


def _replicated(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    return model, lambda seed: perturb(model, seed=seed)


def _fsdp2(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    return trainer.group.share(model, "fsdp2"), lambda seed: perturb(model, seed=seed)


def _offloaded(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model, lambda seed: perturb(model, seed=seed)


def _tensor_parallel(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    """Rows or columns of every weight; vectors are whole on both ranks."""
    mesh = dist.init_device_mesh("cpu", (2,))
    for number, (name, param) in enumerate(list(model.named_parameters())):
        placement = Replicate() if param.dim() < 2 else Shard(number % 2)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(distribute_tensor(param.data, mesh, [placement])))
    model.tie_weights()  # type: ignore[operator]
    return model, lambda seed: perturb(model, seed=seed)


def _fsdp1(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    def refresh(seed: int) -> None:
        with FullyShardedDataParallel.summon_full_params(wrapped):
            perturb(model, seed=seed)

    return wrapped, refresh


def _stages(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    """Every other parameter on either rank, as pipeline stages and expert parallelism have it."""
    own = {name: param for index, (name, param) in enumerate(model.named_parameters()) if index % 2 == trainer.rank}
    return own, lambda seed: perturb(model, seed=seed)


def _flat(model: nn.Module, trainer: Trainer) -> tuple[Weights, Callable[[int], object]]:
    """Uneven ranges of flattened parameters; this rank's memory is its own, and strided."""
    state: dict[str, Holding] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, param in model.named_parameters():
        flat = param.detach().view(-1)
        middle = flat.numel() // 3 + 1
        start, stop = ((0, middle), (middle, flat.numel()))[trainer.rank]
        own = torch.empty(stop - start, 2)[:, 1]
        copies.append((own, flat[start:stop]))
        state[name] = Holding(own, shape=param.shape, start=(start,), view=(flat.numel(),))

    def refresh(seed: int) -> None:
        perturb(model, seed=seed)
        for own, part in copies:
            own.copy_(part)

    return state, refresh


LAYOUTS = {
    "replicated": _replicated,
    "FSDP2": _fsdp2,
    "FSDP2, offloaded": _offloaded,
    "tensor parallel": _tensor_parallel,
    "FSDP1": _fsdp1,
    "stages": _stages,
    "flat ranges": _flat,
}
