"""The same weights as several trainer ranks hold them, in every layout; each rank's memory is its own.

No process group is needed: each rank is simulated by a mesh that takes this process for it.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from ranks import Weights
from shards import random_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from rollcast.comm import Holding

States = list[dict[str, Any]]
Layout = Callable[[Weights, int, random.Random], States]


def replicated(weights: Weights, ranks: int, _: random.Random) -> States:
    return [{name: tensor.clone() for name, tensor in weights.items()} for _ in range(ranks)]


def fsdp2(weights: Weights, ranks: int, _: random.Random) -> States:
    meshes = [mesh_of(rank, (ranks,)) for rank in range(ranks)]
    return [{name: placed(full, mesh, [Shard(0)]) for name, full in weights.items()} for mesh in meshes]


def masters(weights: Weights, ranks: int, rng: random.Random) -> States:
    """FSDP2 in a wider dtype, which is cast to the engine's."""
    return fsdp2({name: wider(full) for name, full in weights.items()}, ranks, rng)


def hsdp(weights: Weights, ranks: int, _: random.Random) -> States:
    replicas = 2 if ranks % 2 == 0 else 1
    meshes = [mesh_of(rank, (replicas, ranks // replicas)) for rank in range(ranks)]
    return [{name: placed(full, mesh, [Replicate(), Shard(0)]) for name, full in weights.items()} for mesh in meshes]


def tensor_parallel(weights: Weights, ranks: int, _: random.Random) -> States:
    """Rows, columns or any other dimension; vectors are whole on every rank."""
    meshes = [mesh_of(rank, (ranks,)) for rank in range(ranks)]

    def placement(number: int, full: torch.Tensor) -> list[Any]:
        return [Replicate() if full.dim() < 2 else Shard(number % full.dim())]

    items = list(enumerate(weights.items()))
    return [{name: placed(full, mesh, placement(number, full)) for number, (name, full) in items} for mesh in meshes]


def fsdp2_and_tensor_parallel(weights: Weights, ranks: int, _: random.Random) -> States:
    """FSDP2 cuts the rows of a tensor-parallel rank; vectors are cut by FSDP2 alone."""
    parallel = 2 if ranks % 2 == 0 else ranks
    meshes = [mesh_of(rank, (ranks // parallel, parallel)) for rank in range(ranks)]

    def placement(full: torch.Tensor) -> list[Any]:
        both = [_StridedShard(0, split_factor=parallel), Shard(0)]
        return [Shard(0), Replicate()] if full.dim() < 2 else both

    return [{name: placed(full, mesh, placement(full)) for name, full in weights.items()} for mesh in meshes]


def stages(weights: Weights, ranks: int, _: random.Random) -> States:
    """Every parameter on one rank, as pipeline stages and expert parallelism have it."""
    states: States = [{} for _ in range(ranks)]
    for number, (name, full) in enumerate(weights.items()):
        states[number % ranks][name] = full.clone()
    return states


def flat(weights: Weights, ranks: int, rng: random.Random) -> States:
    """Uneven ranges of the flattened parameters, some of them empty."""
    states: States = [{} for _ in range(ranks)]
    for name, full in weights.items():
        ends = [0, *sorted(rng.randint(0, full.numel()) for _ in range(ranks - 1)), full.numel()]
        for rank, state in enumerate(states):
            part = full.flatten()[ends[rank] : ends[rank + 1]].clone()
            state[name] = Holding(part, full.shape, (ends[rank],), (full.numel(),))
    return states


def random_boxes(weights: Weights, ranks: int, rng: random.Random) -> States:
    """Boxes of any view of the parameter, each on one rank or two."""
    return [*random_shards(rng, weights, ranks).held]


LAYOUTS: dict[str, Layout] = {
    "replicated": replicated,
    "FSDP2": fsdp2,
    "FSDP2 masters": masters,
    "HSDP": hsdp,
    "tensor parallel": tensor_parallel,
    "FSDP2 and tensor parallel": fsdp2_and_tensor_parallel,
    "stages": stages,
    "flat": flat,
    "random boxes": random_boxes,
}


def mesh_of(rank: int, shape: tuple[int, ...]) -> DeviceMesh:
    """The mesh of ranks 0, 1, ... as this rank has it."""
    ranks = torch.arange(torch.Size(shape).numel()).view(shape)
    return DeviceMesh("cpu", ranks, _init_backend=False, _rank=rank)


def placed(full: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> torch.Tensor:
    """This rank's part as torch places it. A tensor without dimensions is whole on every rank."""
    if not full.dim():
        placements = [Replicate()] * len(placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    local = full
    # As FSDP2 does it: after the mesh dimensions to the right of its own.
    for index in sorted(range(len(placements)), key=lambda index: isinstance(placements[index], _StridedShard)):
        if not isinstance(placements[index], Replicate):
            local = chunk(local, placements[index].dim, coordinate[index], mesh.size(index))
    shape, stride = full.shape, full.contiguous().stride()
    return DTensor.from_local(local.clone(), mesh, placements, run_check=False, shape=shape, stride=stride)


def chunk(tensor: torch.Tensor, dim: int, index: int, count: int) -> torch.Tensor:
    """As `torch.chunk`, which leaves out chunks that are empty."""
    chunks = tensor.chunk(count, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
