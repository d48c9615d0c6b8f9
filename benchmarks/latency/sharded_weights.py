"""The weights that one trainer rank holds in a layout (every trainer rank of the latency benchmark)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from latency.layouts import Layout
from latency.seeded import SeededParams
from rollcast.comm import Manifest

EXPERT = re.compile(r"\.experts\.(\d+)\.")
# What tensor parallelism splits by columns of the weight, and by its rows; the rest is on every rank.
BY_INPUT = ("o_proj.weight", "down_proj.weight")
BY_OUTPUT = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
BY_OUTPUT += ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class RankWeights:
    """What one rank holds."""

    state: dict[str, torch.Tensor]
    """A state dict of tensors and `DTensor`s, as a broadcaster takes it."""
    local: list[torch.Tensor]
    """The memory behind it."""

    def sharded_bytes(self) -> int:
        """Return the bytes of all whole parameters of which this rank has a part."""
        sharded = [tensor for tensor in self.state.values() if is_sharded(tensor)]
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in sharded)


def rank_weights(manifest: Manifest, layout: Layout, *, rank: int, device: torch.device) -> RankWeights:
    """Make this rank's weights; no more than one parameter is whole at a time. Collective over the trainer ranks."""
    mesh = make_mesh(layout, device)
    seeded = SeededParams(device)
    owners = expert_owners(manifest, layout.trainers) if layout.holds == "ep" else {}
    state: dict[str, torch.Tensor] = {}
    local: list[torch.Tensor] = []
    for spec in manifest.specs:
        if owners.get(spec.name, rank) != rank:
            continue
        whole = seeded.make(spec)
        dtype = torch.float32 if layout.holds == "fsdp2-fp32" else spec.dtype
        placements = placements_of(spec.name, layout.holds)
        own = own_copy(whole if mesh is None else shard_of(whole, placements, mesh), dtype)
        local.append(own)
        state[spec.name] = own
        if mesh is not None:
            size = {"shape": whole.shape, "stride": whole.stride()}
            state[spec.name] = DTensor.from_local(own, mesh, placements, run_check=False, **size)
    return RankWeights(state, local)


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh | None:
    """Return the mesh of the shards; None where every tensor of a rank is whole."""
    if layout.holds in ("replicated", "ep"):
        return None
    shape = (2, layout.trainers // 2) if layout.holds == "hsdp" else (layout.trainers,)
    return init_device_mesh(device.type, shape)


def placements_of(name: str, holds: str) -> list[Placement]:
    """Return how a parameter is placed on the mesh."""
    if holds == "hsdp":
        return [Replicate(), Shard(0)]
    if holds != "tp" or name.endswith(BY_OUTPUT):
        return [Shard(0)]
    return [Shard(1) if name.endswith(BY_INPUT) else Replicate()]


def shard_of(whole: torch.Tensor, placements: Sequence[Placement], mesh: DeviceMesh) -> torch.Tensor:
    """Return this rank's part of a tensor, by torch's rule for uneven chunks."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for index, placement in enumerate(placements):
        if isinstance(placement, Shard):
            chunks = whole.chunk(mesh.size(index), placement.dim)
            none = whole.narrow(placement.dim, 0, 0)
            whole = chunks[coordinate[index]] if coordinate[index] < len(chunks) else none
    return whole


def own_copy(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy, in a memory block of its own as a trainer has it."""
    return torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)


def expert_owners(manifest: Manifest, ranks: int) -> dict[str, int]:
    """Return the rank that has each expert's parameters: consecutive experts, as many on every rank."""
    experts = {spec.name: int(match[1]) for spec in manifest.specs if (match := EXPERT.search(spec.name))}
    count = max(experts.values(), default=-1) + 1
    return {name: expert * ranks // count for name, expert in experts.items()}


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether some other rank has a part of the tensor."""
    return isinstance(tensor, DTensor) and any(isinstance(placement, Shard) for placement in tensor.placements)
