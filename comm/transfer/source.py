"""The trainer's weights: their specs, what this rank holds of them, and these parts in any order (trainer)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rollcast.comm.device.storage import ModuleSnapshot, StorageSnapshot, storage_id, tensor_id
from rollcast.comm.plan.box import Box
from rollcast.comm.plan.holders import HeldParam
from rollcast.comm.plan.kept import Kept
from rollcast.comm.plan.manifest import Manifest, ParamSpec
from rollcast.comm.transfer.checkpoint_names import checkpoint_names
from rollcast.comm.transfer.conversion import Conversion, Converted, Converter
from rollcast.comm.transfer.fsdp import has_other_hooks, reshard
from rollcast.comm.transfer.holding import LocalParam, Weights, local_param, tensors_of
from rollcast.comm.transfer.wrappers import state_of, unwrap

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
    It has checkpoint names and shapes: those that `save_pretrained` would write for a model of transformers, the
    trainer's own for anything else, or what the function `names` makes of the trainer's tensors (see `conversion.py`).
    What matches a pattern of `keep` (see `Kept`) is not sent, nor, with `keep_frozen`, what is made of parameters with
    `requires_grad=False` alone. Raises `ValueError` for weights that cannot be sent.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        dtype: torch.dtype | None = None,
        names: Conversion | None = None,
        keep: Sequence[str] = (),
        keep_frozen: bool = False,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self._weights = weights
        self._dtype = dtype
        model = unwrap(weights) if isinstance(weights, nn.Module) else None
        self._converter = Converter(names or (checkpoint_names(model) if model is not None else None))
        self._keep_frozen = keep_frozen
        self.kept = Kept(patterns=tuple(keep))
        """What this rank has and does not send, as of the last `current_manifest`."""
        # What this rank holds, by the trainer's names.
        self._held: dict[str, LocalParam] = {}
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
            self._held = self._named()
            bound = self._bind(self._held)
            specs = {name: self._spec(name, param) for name, param in bound.items()}
            kept = [spec for name, spec in specs.items() if self._is_kept(name, bound[name])]
            self.kept = Kept(Manifest(tuple(kept)), self.kept.patterns)
            for spec in kept:
                del bound[spec.name], specs[spec.name]
            self._params = list(bound.values())
            manifest = Manifest(tuple(specs.values()))
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
        owners = {id(owner): owner for param in params for owner in self._owners[param]}
        return StorageSnapshot([*owners.values()])

    def stable_params(self) -> list[LocalParam] | None:
        """Return the tensors of the last `current_manifest` if `gather` yields exactly these, sync after sync.

        It is the same list object until the trainer moves or replaces a tensor. None where tensors are made anew for
        each sync.
        """
        return self._params if self._module_snapshot is not None else None

    def release(self) -> None:
        """Drop all references to the tensors; the next `current_manifest` finds them again."""
        self._module_snapshot, self._held, self._params, self._checked, self._owners = None, {}, [], [], []

    def formats(self) -> list[list[LocalFormat]]:
        """Return how this rank's tensors of each parameter are in memory."""
        return [
            [
                LocalFormat(box, tensor.dtype, tensor.device.type, tensor.stride())
                for box, tensor in zip(param.boxes, param.tensors, strict=True)
            ]
            for param in self._params
        ]

    def _is_kept(self, name: str, param: LocalParam) -> bool:
        if self.kept.matches(name):
            return True
        made_of = [self._held[each.name].held for each in param.held.pieces] if is_made(param) else [param.held]
        return self._keep_frozen and all(isinstance(p, nn.Parameter) and not p.requires_grad for p in made_of)

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

    def _bind(self, held: dict[str, LocalParam]) -> dict[str, LocalParam]:
        """Return what this rank holds of the checkpoint's parameters, by their names."""
        return self._converter.bind(held)

    def _named(self) -> dict[str, LocalParam]:
        """Return what this rank holds, by the trainer's names."""
        named: dict[str, LocalParam] = {}
        seen: set[object] = set()
        for name, held in state_of(self._weights):
            param = local_param(name, held)
            key = (param.shape, *map(tensor_id, param.tensors))
            if key not in seen:
                named[name] = param
            seen.add(key)
        return named


def is_made(param: LocalParam) -> bool:
    """Return whether the parameter is made of others."""
    return isinstance(param.held, Converted)


def _named_boxes(boxes: Sequence[Box]) -> str:
    return " and ".join(map(str, boxes))


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
    owners = [[owner for each in param.owners for owner in at.get(_position(each), [])] for param in params]
    return (snapshot, owners) if all(owners) else (None, [])


def _position(tensor: torch.Tensor) -> object:
    """Return where a tensor begins. (An alias may be shorter than its owner, which is padded.)"""
    return storage_id(tensor), tensor.storage_offset()
