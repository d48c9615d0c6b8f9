"""The trainer's weights: their specs, and their full values in any order (trainer)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rollcast.comm.device.storage import ModuleSnapshot, StorageSnapshot, tensor_id
from rollcast.comm.plan.manifest import Manifest, ParamSpec

# Wrappers that add a level to the names of the modules they wrap, and no weight of their own.
WRAPPER_LEVELS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})

Weights = nn.Module | Mapping[str, torch.Tensor]
# With at least this many tensors, reading all their addresses takes milliseconds: it is done bucket by bucket instead.
MANY_TENSORS = 2048


class WeightSource:
    """The trainer's weights, in manifest order.

        source = WeightSource(model, dtype=torch.bfloat16)
        for param, tensor in source.gather([2, 0]):     # on every trainer rank: gathering is collective
            source.manifest.specs[param].name           # of the third parameter, then of the first

    Takes an `nn.Module` (plain, DDP, compiled, or sharded with FSDP2) or a state dict of tensors; sharded
    tensors (`DTensor`) are gathered one at a time. Parameters and persistent buffers are sent; a tensor that
    has two names (tied weights) is sent once, under the first. `dtype` is the wire dtype of all floating-point
    tensors (fp32 masters are cast while packing); None sends them as they are. Raises `ValueError` for weights that
    cannot be sent.
    """

    def __init__(self, weights: Weights, *, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self._weights = weights
        self._dtype = dtype
        # None: tensors are gathered, or made anew for each sync.
        self._module_snapshot: ModuleSnapshot | None = None
        # The objects in the module or state dict that each of `_tensors` is an alias of: when the trainer gives one
        # other memory (`.data =`), the alias keeps the old memory and only its owner shows the new.
        self._owners: list[list[torch.Tensor]] = []
        self._manifest: Manifest | None = None
        self.manifest = self.current_manifest()

    @property
    def settings(self) -> str:
        """Text that must be equal on all trainer ranks, besides the manifest."""
        return ""

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, full tensor on the trainer's device, still in the trainer's dtype) in the given order.

        Collective: sharded tensors are gathered one at a time. Raises `ValueError` before the first tensor when
        the weights no longer match the manifest.
        """
        self.check_unchanged()
        tensors = self._tensors
        for param in order:
            yield param, full_tensor(tensors[param])

    def current_manifest(self) -> Manifest:
        """Return the manifest of the weights as they are now. Not collective."""
        if self._module_snapshot is None or not self._module_snapshot.unchanged():
            named = self._named()
            self._tensors = list(named.values())
            manifest = Manifest(tuple(self._spec(name, tensor) for name, tensor in named.items()))
            # The same object while nothing differs: syncs compare objects first, and thousands of specs take 10 ms.
            if manifest != self._manifest:
                self._manifest = manifest
            self._module_snapshot, self._owners = _take_snapshot(self._weights, self._tensors)
        assert self._manifest is not None
        return self._manifest

    def peek_manifest(self) -> Manifest:
        """Return the same as `current_manifest`, but read no address if there are thousands of stable tensors.

        Reading them all takes tens of milliseconds before the first byte; each bucket's `storage_snapshot` is compared
        instead, just before it is sent.
        """
        snapshot = self._module_snapshot if self.stable_tensors() is not None else None
        if snapshot is not None and len(self._tensors) >= MANY_TENSORS and snapshot.same_tensors():
            assert self._manifest is not None
            return self._manifest
        return self.current_manifest()

    def check_unchanged(self, current: Manifest | None = None) -> None:
        """Raise `ValueError` naming the first weight that differs from the manifest.

        `current` is the result of `peek_manifest`, if that was called for this sync; else `current_manifest` is.
        """
        if difference := self.manifest.difference(current or self.current_manifest()):
            raise ValueError(f"the trainer's weights changed since the broadcaster was made: {difference}")

    def storage_snapshot(self, params: Sequence[int]) -> StorageSnapshot:
        """Return where some parameters are in memory now. Only for `stable_tensors`."""
        return StorageSnapshot([owner for param in params for owner in self._owners[param]])

    def stable_tensors(self) -> list[torch.Tensor] | None:
        """Return the tensors of the last `current_manifest` if `gather` yields exactly these, sync after sync.

        It is the same list object until the trainer moves or replaces a tensor. None where tensors are gathered, or
        made anew for each sync.
        """
        return self._tensors if self._module_snapshot is not None else None

    def release(self) -> None:
        """Drop all references to the tensors; the next `current_manifest` finds them again."""
        self._module_snapshot, self._tensors, self._owners = None, [], []

    def formats(self) -> list[tuple[torch.dtype, str]]:
        """Return the dtype and device type of each parameter at the trainer."""
        return [(tensor.dtype, tensor.device.type) for tensor in self._tensors]

    def _spec(self, name: str, tensor: torch.Tensor) -> ParamSpec:
        if tensor.is_meta:
            raise ValueError(f"parameter {name} has no data (it is on the meta device)")
        # Eight-bit floats are quantised values, whose scales travel beside them.
        cast = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        dtype = self._dtype if self._dtype and cast else tensor.dtype
        return ParamSpec(name, tuple(tensor.shape), dtype)

    def _named(self) -> dict[str, torch.Tensor]:
        """Return the tensors to send, by name."""
        named: dict[str, torch.Tensor] = {}
        seen: set[object] = set()
        for name, tensor in _state_dict(self._weights):
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name} is not a tensor but {type(tensor).__name__}")
            if (key := tensor_id(tensor)) not in seen:
                named[name] = tensor.detach()
            seen.add(key)
        return named


def _state_dict(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    module: nn.Module = weights.module if isinstance(weights, nn.parallel.DistributedDataParallel) else weights
    for name, tensor in module.state_dict().items():
        yield plain_name(name), tensor


def plain_name(name: str) -> str:
    """Return the name of a parameter or module without the levels that wrappers add."""
    return ".".join(level for level in name.split(".") if level not in WRAPPER_LEVELS)


def unwrap(module: nn.Module) -> Any:
    """Return the model that DDP or torch.compile wraps."""
    while True:
        inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else None
        inner = getattr(module, "_orig_mod", None) if inner is None else inner
        if inner is None:
            return module
        module = inner


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _take_snapshot(
    weights: Weights, tensors: Sequence[torch.Tensor]
) -> tuple[ModuleSnapshot | None, list[list[torch.Tensor]]]:
    """Return a snapshot of the weights, and for each of `tensors` the objects in it that are this tensor.

    Tied weights are several objects. None if any tensor is sharded, strided or made by `state_dict()` itself.
    """
    if any(isinstance(tensor, DTensor) or not tensor.is_contiguous() for tensor in tensors):
        return None, []
    if isinstance(weights, nn.Module):
        if any(module._state_dict_hooks or module._state_dict_pre_hooks for module in weights.modules()):
            return None, []
        snapshot = ModuleSnapshot.of_module(weights)
    elif isinstance(weights, dict):
        snapshot = ModuleSnapshot([weights])
    else:
        return None, []
    by_id: dict[object, list[torch.Tensor]] = defaultdict(list)
    for tensor in snapshot.tensors:
        by_id[tensor_id(tensor)].append(tensor)
    owners = [by_id.get(tensor_id(tensor), []) for tensor in tensors]
    return (snapshot, owners) if all(owners) else (None, [])
