"""Watches vLLM's loader run on tensors without data, and notes what it copies where (worker)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollcast.comm import Region
from rollcast.rollout.errors import RollcastError

aten = torch.ops.aten

# Copies that keep every element and its place: reading through them is reading the source.
FAITHFUL_COPIES = frozenset({aten.clone.default, aten._to_copy.default})
# Operations that look at a tensor's shape and dtype only.
SHAPE_ONLY = frozenset(
    {aten.empty_like.default, aten.new_empty.default, aten.zeros_like.default, aten.ones_like.default}
)


class LandingError(RollcastError):
    """The engine's model cannot take these weights in place."""


@dataclass(frozen=True, slots=True)
class Move:
    """One piece of one parameter: from a region of the received tensor to a region of a live one."""

    param: int
    """Index into the manifest."""
    source: Region
    target: str
    """vLLM's name of the live tensor."""
    region: Region


@dataclass(frozen=True, slots=True)
class Fill:
    """A region of a live tensor that the loader sets to a constant."""

    target: str
    region: Region
    value: torch.Tensor
    """Scalar, or of the region's shape."""


class Recorder(TorchDispatchMode):
    """Notes copies from manifest tensors (meta) into live tensors; computes geometry only."""

    def __init__(self, sources: Sequence[torch.Tensor], live: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self.fills: list[Fill] = []
        self._sources = {_storage(tensor): (index, tensor.dtype) for index, tensor in enumerate(sources)}
        self._live: dict[int, tuple[str, int]] = {}
        for name, tensor in live.items():
            self._live.setdefault(_storage(tensor), (name, int(tensor.storage_offset()) * tensor.element_size()))
        # Storages of faithful copies: (parameter, region of the source that they are). Kept alive with them,
        # or a later tensor could get the same address.
        self._copies: dict[int, tuple[int, Region, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(self._is_tracked(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        if func is aten.copy_.default and self._is_live(args[0]):
            self._note_copy(args[0], args[1])
            return args[0]
        if func._schema.is_mutable:
            if func in (aten.zero_.default, aten.fill_.Scalar) and self._is_live(args[0]):
                self._note_fill(args[0], torch.tensor([*args, 0][1], dtype=args[0].dtype))
                return args[0]
            raise LandingError(f"the loader changes a tensor in place ({func})")
        if "device" in kwargs and any(self._is_source(tensor) for tensor in tensors):
            kwargs["device"] = torch.device("meta")
        result = func(*args, **kwargs)
        if func in FAITHFUL_COPIES and self._is_source(args[0]):
            index, region = self._origin(args[0])
            if not _widens(region.dtype, args[0].dtype):
                raise LandingError(f"the loader casts {region.dtype} to {args[0].dtype} and then again")
            self._copies[_storage(result)] = (index, region, result)
        elif any(self._is_live(tensor) for tensor in tensors) and func not in SHAPE_ONLY:
            self._refuse_unless_view(func, result)
        return result

    def _refuse_unless_view(self, func: Any, result: Any) -> None:
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or not self._is_live(leaf):
                raise LandingError(f"the loader computes with a live parameter ({func})")

    def _is_live(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._live

    def _is_source(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._sources or _storage(tensor) in self._copies

    def _is_tracked(self, tensor: torch.Tensor) -> bool:
        return self._is_live(tensor) or self._is_source(tensor)

    def _origin(self, tensor: torch.Tensor) -> tuple[int, Region]:
        """The manifest parameter and the region of it that `tensor` holds."""
        key = _storage(tensor)
        if key in self._sources:
            index, dtype = self._sources[key]
            if tensor.dtype != dtype or tensor.is_conj() or tensor.is_neg():
                raise LandingError(f"the loader takes the bytes of {dtype} for something else")
            return index, Region.of(tensor)
        if key not in self._copies:
            raise LandingError("the loader computes the value instead of copying it")
        index, region, copy = self._copies[key]
        if (tensor.shape, tensor.stride(), tensor.dtype) != (copy.shape, copy.stride(), copy.dtype):
            raise LandingError("the loader takes a part of a copy")
        return index, region

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not self._is_tracked(source) and not source.is_meta:
            self._note_fill(target, source.detach().clone())
            return
        index, region = self._origin(source)
        if source.dtype != target.dtype and not _widens(region.dtype, source.dtype):
            raise LandingError(f"the loader casts {region.dtype} to {source.dtype} on the way to {target.dtype}")
        if source.shape != target.shape:
            if source.numel() != target.numel():
                raise LandingError(f"the loader stretches {list(source.shape)} to {list(target.shape)}")
            region = Region.of(
                torch.empty(0, device="meta", dtype=region.dtype)
                .as_strided(region.shape, region.stride, region.offset)
                .expand(target.shape)
            )
        name, base = self._live[_storage(target)]
        self.moves.append(Move(index, region, name, Region.of(target, base_offset_bytes=base)))

    def _note_fill(self, target: torch.Tensor, value: torch.Tensor) -> None:
        name, base = self._live[_storage(target)]
        region = Region.of(target, base_offset_bytes=base)
        if any(move.target == name and _overlap(move.region, region) for move in self.moves):
            raise LandingError(f"the loader overwrites a part of {name} that it has loaded")
        self.fills.append(Fill(name, region, value))


def intervals(region: Region) -> list[tuple[int, int]]:
    """The region as runs of elements [start, end) of the flat tensor."""
    if region.numel == 0:
        return []
    dims = [(size, stride) for size, stride in zip(region.shape, region.stride, strict=True) if size > 1]
    run = 1
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    starts = [sum(steps) for steps in product(*(range(0, size * stride, stride) for size, stride in dims))]
    return [(region.offset + start, region.offset + start + run) for start in starts]


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory, the same for all its views, on meta too."""
    return tensor.untyped_storage()._cdata


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if narrow == wide:
        return True
    return narrow.is_floating_point and wide.is_floating_point and torch.promote_types(narrow, wide) == wide


def _overlap(first: Region, second: Region) -> bool:
    runs = sorted(intervals(first) + intervals(second))
    return any(start < end for (_, end), (start, _) in pairwise(runs))
