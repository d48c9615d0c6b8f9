"""The trainer's weights: their specs, and their values in any order (trainer)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rollcast.comm.device.storage import Places, Spots, identity
from rollcast.comm.plan.manifest import Manifest, ParamSpec

# Wrappers that add a level to the names of the modules they wrap, and no weight of their own.
WRAPPER_LEVELS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})

Weights = nn.Module | Mapping[str, torch.Tensor]
# From here on asking every tensor where it is costs milliseconds: the buckets ask for theirs.
MANY = 2048


class WeightSource:
    """The trainer's weights, in manifest order.

        source = WeightSource(model, dtype=torch.bfloat16)
        for spec, tensor in source:         # every trainer rank walks it: gathering is collective
            ...

    Takes an `nn.Module` (plain, DDP, compiled, or sharded with FSDP2) or a state dict of tensors; sharded
    tensors (`DTensor`) are gathered one at a time. Parameters and persistent buffers are sent; a tensor that
    has two names (tied weights) is sent once, under the first. `dtype` is the wire dtype of all floating-point
    tensors (fp32 masters are cast while packing); None sends them as they are.
    """

    def __init__(self, weights: Weights, *, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self._weights = weights
        self._dtype = dtype
        self._places: Places | None = None
        # Of each parameter, what is in its places: `_tensors` are aliases, which do not see it get other memory.
        self._owners: list[list[torch.Tensor]] = []
        self.manifest = self.current()

    @property
    def settings(self) -> str:
        """What all trainer ranks must agree on beside the manifest, in words."""
        return ""

    def __iter__(self) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
        """Yield (spec, full tensor) of every parameter in manifest order; see `walk`. Collective."""
        for param, tensor in self.walk(range(len(self.manifest.specs))):
            yield self.manifest.specs[param], tensor

    def walk(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, full tensor on the trainer's device, still in the trainer's dtype) in the given order.

        Collective: sharded tensors are gathered one at a time. Raises `ValueError` before the first tensor when
        the weights no longer match the manifest.
        """
        self.check()
        tensors = self._tensors
        for param in order:
            yield param, full(tensors[param])

    def current(self) -> Manifest:
        """The manifest of the weights as they are now. Not collective."""
        if self._places is None or not self._places.unchanged():
            named = self._named()
            self._tensors = list(named.values())
            self._manifest = Manifest(tuple(self._spec(name, tensor) for name, tensor in named.items()))
            self._places, self._owners = _places_of(self._weights, self._tensors)
        return self._manifest

    def check(self, found: Manifest | None = None) -> None:
        """Raises `ValueError` naming what of the weights is not as the manifest says, if anything is.

        `found` is the answer of a `glance`, where there was one; else `current` is asked.
        """
        if difference := self.manifest.difference(found or self.current()):
            raise ValueError(f"the trainer's weights changed since the broadcaster was made: {difference}")

    def glance(self) -> Manifest:
        """The same as `current`, but where there are thousands of `steady` tensors, without a look at their memory.

        That takes tens of milliseconds, before the first byte. `spots` tell, bucket by bucket.
        """
        many = len(self._tensors) >= MANY and self.steady() is not None
        return self._manifest if many and self._places and self._places.same() else self.current()

    def spots(self, params: Sequence[int]) -> Spots:
        """Where the memory of some parameters is now, if the weights are `steady`."""
        return Spots([owner for param in params for owner in self._owners[param]])

    def steady(self) -> list[torch.Tensor] | None:
        """The tensors of the last `current`, if `walk` yields just those and they stay where they are.

        The same list for as long as they do. None where tensors are gathered, or made anew for each sync.
        """
        return self._tensors if self._places is not None else None

    def release(self) -> None:
        """Let go of the tensors; the next `current` finds them again."""
        self._places, self._tensors, self._owners = None, [], []

    def formats(self) -> list[tuple[torch.dtype, str]]:
        """Dtype and kind of device of each parameter, as the trainer has it."""
        return [(tensor.dtype, tensor.device.type) for tensor in self._tensors]

    def _spec(self, name: str, tensor: torch.Tensor) -> ParamSpec:
        if tensor.is_meta:
            raise ValueError(f"parameter {name} has no data (it is on the meta device)")
        # Eight-bit floats are quantised values, whose scales travel beside them.
        cast = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        dtype = self._dtype if self._dtype and cast else tensor.dtype
        return ParamSpec(name, tuple(tensor.shape), dtype)

    def _named(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = {}
        seen: set[object] = set()
        for name, tensor in _state(self._weights):
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name} is not a tensor but {type(tensor).__name__}")
            if (key := identity(tensor)) not in seen:
                named[name] = tensor.detach()
            seen.add(key)
        return named


def _state(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    module: nn.Module = weights.module if isinstance(weights, nn.parallel.DistributedDataParallel) else weights
    for name, tensor in module.state_dict().items():
        yield plain_name(name), tensor


def plain_name(name: str) -> str:
    """The name of a parameter or module without the levels of wrappers."""
    return ".".join(level for level in name.split(".") if level not in WRAPPER_LEVELS)


def unwrapped(module: nn.Module) -> Any:
    """The model that DDP or torch.compile wraps."""
    while True:
        inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else None
        inner = getattr(module, "_orig_mod", None) if inner is None else inner
        if inner is None:
            return module
        module = inner


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _places_of(weights: Weights, tensors: Sequence[torch.Tensor]) -> tuple[Places | None, list[list[torch.Tensor]]]:
    """The places of all `tensors`, and what is there: several objects, if they share memory.

    None if any is sharded, strided or made for the occasion.
    """
    if any(isinstance(tensor, DTensor) or not tensor.is_contiguous() for tensor in tensors):
        return None, []
    if isinstance(weights, nn.Module):
        if any(module._state_dict_hooks or module._state_dict_pre_hooks for module in weights.modules()):
            return None, []
        places = Places.of_module(weights)
    elif isinstance(weights, dict):
        places = Places([weights])
    else:
        return None, []
    kept: dict[object, list[torch.Tensor]] = defaultdict(list)
    for tensor in places.tensors:
        kept[identity(tensor)].append(tensor)
    owners = [kept.get(identity(tensor), []) for tensor in tensors]
    return (places, owners) if all(owners) else (None, [])
