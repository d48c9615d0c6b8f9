"""What this rank holds of each parameter: derived from the trainer's tensors, or stated by the user (trainer)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from rollcast.comm.device.storage import local_tensor, storage_id
from rollcast.comm.plan.box import Box


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """A part of one parameter that this trainer rank has in memory, whatever its layout.

        {"q_proj.weight": Holding(local, shape=(4096, 4096), start=(1024, 0))}      # rows 1024 to 2047

    A state dict may have a `Holding`, or a tuple of them, in the place of a tensor; each rank lists what it has. All
    ranks together must hold every element. Ranks that hold the same share out the work of sending it.

    A view of a parameter is refused once the parameter has other memory (`.data =`): make the holding anew. Views of
    what `.detach()` or `.data` returned are not followed.
    """

    tensor: torch.Tensor
    """The elements, on any device, with any strides, and of the same dtype on all ranks. Views are read when the
    weights are sent, so one local tensor may hold parts of several parameters."""
    shape: Sequence[int]
    """Shape of the full parameter, as in the checkpoint."""
    start: Sequence[int]
    """Index of the tensor's first element in the full parameter, seen with `view`."""
    view: Sequence[int] | None = None
    """Another shape of the full parameter, in which this part is a range of indices in each dimension: (numel,) for a
    part of the flattened parameter, (groups, heads, head_dim, hidden) for some heads of each group. None: `shape`."""

    @property
    def box(self) -> Box:
        """The part as index ranges. Raises `ValueError` if the tensor does not fit into the parameter there."""
        view = tuple(self.shape if self.view is None else self.view)
        if prod(view) != prod(self.shape):
            raise ValueError(f"view {list(view)} has not as many elements as shape {list(self.shape)}")
        if self.tensor.dim() != len(view) or len(self.start) != len(view):
            raise ValueError(f"a tensor of shape {list(self.tensor.shape)} cannot be a part of {list(view)}")
        stop = (first + size for first, size in zip(self.start, self.tensor.shape, strict=True))
        return Box(view, tuple(self.start), tuple(stop))


# bitsandbytes' kinds of parameters, whose elements are not the weight's.
PACKED_KINDS = frozenset({"Params4bit", "Int8Params"})

Held = torch.Tensor | Holding | tuple[Holding, ...]
"""A parameter as a state dict lists it."""
Weights = torch.nn.Module | Mapping[str, Held]


@dataclass(frozen=True, slots=True, eq=False)
class LocalParam:
    """One parameter's full shape, and this rank's tensors with the part that each holds."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    tensors: tuple[torch.Tensor, ...]
    held: Any
    """The object in the module or state dict."""
    views_of: tuple[torch.Tensor, ...] = ()
    """The trainer's own tensors that `tensors` are views of. Empty: they are these."""

    @property
    def owners(self) -> tuple[torch.Tensor, ...]:
        """The trainer's own tensors that have the elements."""
        return self.views_of or self.tensors


def local_param(name: str, held: Any) -> LocalParam:
    """Return what this rank holds of a parameter. Raises `ValueError` for what is no tensor, or cannot be sent."""
    if hasattr(held, "quant_state") or type(held).__name__ in PACKED_KINDS:
        raise ValueError(
            f"{name} is packed by bitsandbytes ({type(held).__name__}): send dequantised weights (model.dequantize()), "
            "or only the adapter, to engines with a lora_rank"
        )
    if isinstance(held, DTensor):
        return LocalParam(tuple(held.shape), (box_of_shard(name, held),), (local_tensor(held).detach(),), held)
    if isinstance(held, torch.Tensor):
        if flat := flat_partition(name, held):
            return _stated(name, [flat], held)
        shape = tuple(held.shape)
        return LocalParam(shape, (Box.whole(shape),), (held.detach(),), held)
    if isinstance(held, Holding):
        return _stated(name, [held], held)
    if isinstance(held, tuple) and held and all(isinstance(each, Holding) for each in held):
        return _stated(name, held, held)
    raise ValueError(f"{name} is not a tensor but {type(held).__name__}")


def _stated(name: str, holdings: Sequence[Holding], held: Any) -> LocalParam:
    shapes = {tuple(holding.shape) for holding in holdings}
    for tensor in (holding.tensor for holding in holdings):
        if isinstance(tensor, DTensor):
            raise ValueError(f"{name}: a holding needs this rank's own tensor: pass to_local() of the DTensor")
        if tensor._base is not None and storage_id(tensor._base) != storage_id(tensor):
            raise ValueError(f"{name}: its holding is a view of memory that was replaced: make it anew")
    if len(shapes) > 1:
        raise ValueError(f"{name}: its holdings state different shapes: {sorted(map(list, shapes))}")
    try:
        boxes = tuple(holding.box for holding in holdings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return LocalParam(shapes.pop(), boxes, tuple(holding.tensor.detach() for holding in holdings), held)


def tensors_of(held: Any) -> list[torch.Tensor]:
    """Return this rank's tensors of what a state dict lists."""
    if isinstance(held, Holding):
        return [held.tensor] if held.tensor._base is None else [held.tensor, held.tensor._base]
    if isinstance(held, torch.Tensor):
        return [local_tensor(held)]
    return [tensor for holding in held for tensor in tensors_of(holding)]


def box_of_shard(name: str, tensor: DTensor) -> Box:
    """Return this rank's part of a sharded tensor. Raises `ValueError` for a placement that is no box.

    `Shard` splits as `torch.chunk` does, mesh dimension by mesh dimension. FSDP2 on top of tensor parallelism shards
    what a tensor-parallel rank has, and states that as `_StridedShard`: after the mesh dimensions to its right.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    start, stop = [0] * tensor.dim(), list(tensor.shape)
    if coordinate is None:
        # A rank outside the mesh has nothing of it.
        return Box(tuple(tensor.shape), tuple(start), tuple(start))
    strided = [index for index, placement in enumerate(tensor.placements) if isinstance(placement, _StridedShard)]
    plain = [index for index in range(len(tensor.placements)) if index not in strided]
    for index in (*plain, *reversed(strided)):
        placement = tensor.placements[index]
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, Partial) or not isinstance(placement, Shard | _StridedShard):
            raise ValueError(f"{name} cannot be sent: its placement is {placement}")
        dim = placement.dim
        chunk = -(-(stop[dim] - start[dim]) // mesh.size(index))
        end = stop[dim]
        start[dim] = min(start[dim] + coordinate[index] * chunk, end)
        stop[dim] = min(start[dim] + chunk, end)
    box = Box(tuple(tensor.shape), tuple(start), tuple(stop))
    own = local_tensor(tensor)
    if box.extent != tuple(own.shape) and (box.numel or own.numel()):
        raise ValueError(
            f"{name} cannot be sent: this rank has {list(own.shape)} of {list(tensor.shape)}, but its "
            f"placements {tensor.placements} give {box}"
        )
    return box


def flat_partition(name: str, param: torch.Tensor) -> Holding | None:
    """Return this rank's part of a parameter that DeepSpeed's ZeRO-3 has partitioned; None for any other tensor.

    ZeRO-3 empties the parameter and keeps an even share of its flattened, padded elements in `ds_tensor`. Raises
    `ValueError` for a part that is not in memory, or quantised.
    """
    share: Any = getattr(param, "ds_tensor", None)
    if share is None:
        if hasattr(param, "ds_id") and not param.numel():
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, and this rank's share (ds_tensor) is not there: sync "
                "between two steps, outside of deepspeed.zero.GatheredParameters"
            )
        return None
    # `PartitionedParamStatus` of DeepSpeed, which is not imported.
    if getattr(getattr(share, "status", None), "name", "AVAILABLE") != "AVAILABLE":
        raise ValueError(f"{name}: DeepSpeed has this rank's part on NVMe: only parameters in memory can be sent")
    if hasattr(share, "ds_quant_scale"):
        raise ValueError(f"{name}: DeepSpeed has quantised it (zero_quantized_nontrainable_weights): it cannot be sent")
    shape, numel = tuple(param.ds_shape), prod(param.ds_shape)  # pyright: ignore[reportAttributeAccessIssue]
    rank = dist.get_rank(getattr(param, "ds_process_group", None))
    start = min(rank * share.numel(), numel)
    return Holding(share[: min(share.numel(), numel - start)], shape, (start,), (numel,))
