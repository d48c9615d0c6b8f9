"""What FSDP keeps of a module on this rank (trainer)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from rollcast.comm.transfer.holding import Holding


def reshard(weights: object) -> None:
    """Let FSDP2 put the sharded parameters back, which a forward pass without a backward pass leaves whole."""
    if isinstance(weights, nn.Module):
        for part in weights.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def has_other_hooks(module: nn.Module) -> bool:
    """Return whether `state_dict` runs hooks other than FSDP2's, which do what `reshard` does."""
    for part in module.modules():
        hooks = [*part._state_dict_hooks.values(), *part._state_dict_pre_hooks.values()]
        if any(not _module_of(hook).startswith("torch.distributed.fsdp.") for hook in hooks):
            return True
    return False


def _module_of(hook: Any) -> str:
    return getattr(getattr(hook, "hook", hook), "__module__", None) or ""


def fsdp1_state(module: nn.Module) -> dict[str, Holding | torch.Tensor] | None:
    """Return this rank's parts of every parameter of a module that FSDP1 has flattened; None for any other module.

    Each `FlatParameter` keeps an even share of its parameters' concatenated, flattened elements. (`state_dict` would
    gather them.) Persistent buffers, and parameters that FSDP1 ignores, are whole on every rank.
    """
    wrapped = [part for part in module.modules() if isinstance(part, FullyShardedDataParallel)]
    if not wrapped:
        return None
    names = {id(part): f"{name}." if name else "" for name, part in module.named_modules()}
    held = {
        f"{names[id(part)]}{name}": holding
        for part in wrapped
        if part._handle is not None
        for name, holding in _flat_holdings(part._handle)
    }
    flats: list[Any] = [part._handle.flat_param for part in wrapped if part._handle is not None]
    # Tied parameters of one unit are flattened once, under the first name.
    flattened = {id(each) for flat in flats for each in (flat, *(flat._params or ()), *(flat._shared_params or ()))}
    state: dict[str, Holding | torch.Tensor] = {}
    for name, tensor in _own_tensors(module, names):
        if id(tensor) not in flattened:
            state[name] = tensor
    return state | held


def _flat_holdings(handle: Any) -> Iterator[tuple[str, Holding]]:
    flat = handle.flat_param
    # Until the first forward pass, the parameter itself is this rank's share.
    share = getattr(flat, "_local_shard", flat).detach() if handle.uses_sharded_strategy else flat.detach()
    for name, shape, numel, info in zip(flat._fqns, flat._shapes, flat._numels, flat._shard_param_infos, strict=True):
        first, count = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
        start = info.intra_param_start_idx if info.in_shard else 0
        yield name, Holding(share[first : first + count], tuple(shape), (start,), (numel,))


def _own_tensors(module: nn.Module, names: dict[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and persistent buffers that modules have as attributes."""
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and name not in part._non_persistent_buffers_set:
                yield f"{names[id(part)]}{name}", tensor
