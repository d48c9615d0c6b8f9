"""The trainer's weights: their specs, what this rank holds of them, and these parts in any order (trainer)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rollcast.comm.device.storage import ModuleSnapshot, StorageSnapshot, storage_id, tensor_id
from rollcast.comm.plan.box import Box
from rollcast.comm.plan.holders import HeldParam
from rollcast.comm.plan.manifest import Manifest, ParamSpec
from rollcast.comm.transfer.fsdp import fsdp1_state, has_other_hooks, reshard
from rollcast.comm.transfer.holding import LocalParam, Weights, local_param, tensors_of

# Wrappers that add a level to the names of the modules they wrap, and no weight of their own.
WRAPPER_LEVELS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# With at least this many tensors, reading all their addresses takes milliseconds: it is done bucket by bucket instead.
MANY_TENSORS = 2048


@dataclass(frozen=True, slots=True)
class LocalFormat:
    """How one of this rank's tensors has its part of a parameter in memory."""

    box: Box
    dtype: torch.dtype
    device: str
    """Device type."""
    strides: tuple[int, ...]


class WeightSource:
    """The trainer's weights: what this rank holds of each, in manifest order.

        source = WeightSource(model)
        for param, parts in source.gather(order):         # this rank's tensors of manifest.specs[param]
            ...

    Takes an `nn.Module` (plain, DDP, compiled, or sharded: FSDP2, HSDP, tensor parallel, FSDP1, DeepSpeed ZeRO-3) or a
    state dict of tensors, `DTensor`s and `Holding`s, which need not list the parameters of other ranks. Nothing is
    gathered. Parameters and persistent buffers are sent; a tensor that has two names (tied weights) is sent once, under
    the first. The manifest states the trainer's own dtypes, and each worker's plan the dtype in which it receives a
    tensor (fp32 masters are cast while packing). With `dtype`, the manifest states that of all floating-point tensors.
    Raises `ValueError` for weights that cannot be sent.
    """

    def __init__(self, weights: Weights, *, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self._weights = weights
        self._dtype = dtype
        # None: tensors are made anew for each sync.
        self._module_snapshot: ModuleSnapshot | None = None
        # The objects in the module or state dict that the tensors of each parameter are aliases of: when the trainer
        # gives one other memory (`.data =`), the alias keeps the old memory and only its owner shows the new.
        self._owners: list[list[torch.Tensor]] = []
        self._params: list[LocalParam] = []
        self._manifest: Manifest | None = None
        self.manifest = self.current_manifest()
        self._boxes = [param.boxes for param in self._params]
        # The parameters whose boxes are known to be these.
        self._checked = self._params

    @property
    def settings(self) -> str:
        """Text that must be equal on all trainer ranks, besides what they hold."""
        return ""

    @property
    def statement(self) -> list[HeldParam]:
        """What this rank holds of each parameter, in manifest order."""
        pairs = zip(self.manifest.specs, self._params, strict=True)
        return [HeldParam(spec, param.boxes) for spec, param in pairs]

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        """Yield (index, this rank's tensors of the parameter) in the given order, still in the trainer's dtype.

        Raises `ValueError` before the first tensor when the weights no longer match the manifest.
        """
        self.check_unchanged()
        params = self._params
        for index in order:
            yield index, params[index].tensors

    def current_manifest(self) -> Manifest:
        """Return the manifest of the weights as they are now. Not collective."""
        if self._module_snapshot is None or not self._module_snapshot.unchanged():
            reshard(self._weights)
        if self._module_snapshot is None or not self._module_snapshot.unchanged():
            named = self._named()
            self._params = list(named.values())
            manifest = Manifest(tuple(self._spec(name, param) for name, param in named.items()))
            # The same object while nothing differs: syncs compare objects first, and thousands of specs take 10 ms.
            if manifest != self._manifest:
                self._manifest = manifest
            self._module_snapshot, self._owners = _take_snapshot(self._weights, self._params)
        assert self._manifest is not None
        return self._manifest

    def peek_manifest(self) -> Manifest:
        """Return the same as `current_manifest`, but read no address if there are thousands of stable tensors.

        Reading them all takes tens of milliseconds before the first byte; each bucket's `storage_snapshot` is compared
        instead, just before it is sent.
        """
        snapshot = self._module_snapshot if self.stable_params() is not None else None
        if snapshot is not None and len(self._params) >= MANY_TENSORS and snapshot.same_tensors():
            assert self._manifest is not None
            return self._manifest
        return self.current_manifest()

    def check_unchanged(self, current: Manifest | None = None) -> None:
        """Raise `ValueError` naming the first weight that differs from the manifest.

        `current` is the result of `peek_manifest`, if that was called for this sync; else `current_manifest` is.
        """
        if change := self.change(current or self.current_manifest()):
            raise ValueError(f"the trainer's weights changed since the broadcaster was made: {change}")

    def change(self, current: Manifest) -> str | None:
        """Describe the first weight that differs from the manifest, or of which this rank holds another part now."""
        if difference := self.manifest.difference(current):
            return difference
        if self._params is not self._checked:
            for spec, before, param in zip(self.manifest.specs, self._boxes, self._params, strict=True):
                if param.boxes != before:
                    return f"expected {_named_boxes(before)} of {spec}, got {_named_boxes(param.boxes)}"
            self._checked = self._params
        return None

    def storage_snapshot(self, params: Sequence[int]) -> StorageSnapshot:
        """Return where some parameters are in memory now. Only for `stable_params`."""
        return StorageSnapshot([owner for param in params for owner in self._owners[param]])

    def stable_params(self) -> list[LocalParam] | None:
        """Return the tensors of the last `current_manifest` if `gather` yields exactly these, sync after sync.

        It is the same list object until the trainer moves or replaces a tensor. None where tensors are made anew for
        each sync.
        """
        return self._params if self._module_snapshot is not None else None

    def release(self) -> None:
        """Drop all references to the tensors; the next `current_manifest` finds them again."""
        self._module_snapshot, self._params, self._checked, self._owners = None, [], [], []

    def formats(self) -> list[list[LocalFormat]]:
        """Return how this rank's tensors of each parameter are in memory."""
        return [
            [
                LocalFormat(box, tensor.dtype, tensor.device.type, tensor.stride())
                for box, tensor in zip(param.boxes, param.tensors, strict=True)
            ]
            for param in self._params
        ]

    def _spec(self, name: str, param: LocalParam) -> ParamSpec:
        dtypes = {tensor.dtype for tensor in param.tensors}
        if len(dtypes) > 1:
            raise ValueError(f"{name}: its parts differ in dtype: {sorted(map(str, dtypes))}")
        tensor = param.tensors[0]
        if tensor.is_meta:
            raise ValueError(f"parameter {name} has no data (it is on the meta device)")
        # Eight-bit floats are quantised values, whose scales travel beside them.
        cast = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        dtype = self._dtype if self._dtype and cast else tensor.dtype
        return ParamSpec(name, param.shape, dtype)

    def _named(self) -> dict[str, LocalParam]:
        """Return what to send, by name."""
        named: dict[str, LocalParam] = {}
        seen: set[object] = set()
        for name, held in state_of(self._weights):
            param = local_param(name, held)
            key = (param.shape, *map(tensor_id, param.tensors))
            if key not in seen:
                named[name] = param
            seen.add(key)
        return named


class GatheringSource(WeightSource):
    """Weights that are computed, or gathered whole, on every trainer rank for each sync: each has all of them.

    Raises `ValueError` for parameters that FSDP1 or ZeRO-3 has flattened.
    """

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        """See `WeightSource.gather`. Collective: sharded tensors are gathered one at a time."""
        self.check_unchanged()
        for index, tensor in self._full_tensors(order):
            yield index, [tensor.contiguous()]

    def stable_params(self) -> None:
        """See `WeightSource.stable_params`: all are made anew."""

    @property
    def statement(self) -> list[HeldParam]:
        """See `WeightSource.statement`."""
        return [HeldParam(spec, (Box.whole(spec.shape),)) for spec in self.manifest.specs]

    def formats(self) -> list[list[LocalFormat]]:
        """See `WeightSource.formats`."""
        pairs = zip(self.manifest.specs, super().formats(), strict=True)
        return [
            [replace(formats[0], box=(box := Box.whole(spec.shape)), strides=box.strides)] for spec, formats in pairs
        ]

    def current_manifest(self) -> Manifest:
        """See `WeightSource.current_manifest`."""
        manifest = super().current_manifest()
        for spec, param in zip(manifest.specs, self._params, strict=True):
            if not isinstance(param.held, DTensor) and param.boxes != (Box.whole(param.shape),):
                raise ValueError(f"{spec.name}: a peft model that FSDP1 or ZeRO-3 has flattened cannot be gathered")
        return manifest

    def _full_tensors(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, full tensor) in the given order. Collective."""
        params = self._params
        for index in order:
            yield index, full_tensor(params[index].held)


def _named_boxes(boxes: Sequence[Box]) -> str:
    return " and ".join(map(str, boxes))


def state_of(weights: Weights) -> Iterator[tuple[str, Any]]:
    """Yield every parameter and persistent buffer as this rank has it, by the name that a plain model gives it."""
    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    module = unwrap(weights)
    state = fsdp1_state(module)
    for name, held in (module.state_dict(keep_vars=True) if state is None else state).items():
        yield plain_name(name), held


def plain_name(name: str) -> str:
    """Return the name of a parameter or module without the levels that wrappers add."""
    return ".".join(level for level in name.split(".") if level not in WRAPPER_LEVELS)


def unwrap(module: nn.Module) -> Any:
    """Return the model inside wrappers that have no weights of their own: DDP, DeepSpeed's engine, torch.compile."""
    while [*module._modules] in (["module"], ["_orig_mod"]) and not module._parameters and not module._buffers:
        (inner,) = module._modules.values()
        assert inner is not None
        module = inner
    return module


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor. Collective if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _take_snapshot(
    weights: Weights, params: Sequence[LocalParam]
) -> tuple[ModuleSnapshot | None, list[list[torch.Tensor]]]:
    """Return a snapshot of the weights, and for each of `params` the objects in it that its tensors are aliases of.

    Tied weights are several objects. None if any tensor is made by `state_dict()` itself.
    """
    if isinstance(weights, nn.Module):
        if has_other_hooks(weights):
            return None, []
        snapshot = ModuleSnapshot.of_module(weights)
    elif isinstance(weights, dict):
        snapshot = ModuleSnapshot([weights], tensors_of=tensors_of)
    else:
        return None, []
    at: dict[object, list[torch.Tensor]] = defaultdict(list)
    for tensor in snapshot.tensors:
        at[_position(tensor)].append(tensor)
    owners = [[owner for each in param.tensors for owner in at.get(_position(each), [])] for param in params]
    return (snapshot, owners) if all(owners) else (None, [])


def _position(tensor: torch.Tensor) -> object:
    """Return where a tensor begins. (An alias may be shorter than its owner, which is padded.)"""
    return storage_id(tensor), tensor.storage_offset()
