"""What travels: the specs of a model's weights (both sides) and where their values come from (trainer)."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Wrappers that add a level to the names of the modules they wrap, and no weight of their own.
WRAPPER_LEVELS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Name, shape and wire dtype of one checkpoint parameter, as the trainer names it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Manifest:
    """The ordered specs of a whole model. The order is the order of iteration and of the wire."""

    specs: tuple[ParamSpec, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.specs:
            if spec.name in seen:
                raise ValueError(f"parameter {spec.name} is listed twice")
            seen.add(spec.name)
        if not self.specs:
            raise ValueError("a manifest needs at least one parameter, got none")

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of `to_bytes()`: equal digests mean equal manifests."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The manifest as JSON."""
        return json.dumps([[s.name, s.shape, str(s.dtype).removeprefix("torch.")] for s in self.specs]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Inverse of `to_bytes`."""
        rows = json.loads(data)
        return cls(tuple(ParamSpec(name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in rows))

    def difference(self, other: "Manifest") -> str | None:
        """The first place where `other` differs, in words; None when the two are equal."""
        for mine, theirs in zip(self.specs, other.specs, strict=False):
            if mine != theirs:
                return f"expected {mine}, got {theirs}"
        if len(self.specs) != len(other.specs):
            longer, what = (self, "missing") if len(self.specs) > len(other.specs) else (other, "extra")
            return f"{what} {longer.specs[min(len(self.specs), len(other.specs))]}"
        return None


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

    def __init__(self, weights: nn.Module | Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self._weights = weights
        self._dtype = dtype
        self.manifest = self.current()

    def __iter__(self) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
        """Yield (spec, full tensor) of every parameter in manifest order; see `walk`. Collective."""
        for param, tensor in self.walk(range(len(self.manifest.specs))):
            yield self.manifest.specs[param], tensor

    def walk(self, order: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, full tensor on the trainer's device, still in the trainer's dtype) in the given order.

        Collective: sharded tensors are gathered one at a time. Raises `ValueError` before the first tensor when
        the weights no longer match the manifest.
        """
        named = self._named()
        if difference := self.manifest.difference(self._specs(named)):
            raise ValueError(f"the trainer's weights changed since the broadcaster was made: {difference}")
        tensors = list(named.values())
        for param in order:
            tensor = tensors[param]
            yield param, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def current(self) -> Manifest:
        """The manifest of the weights as they are now. Not collective."""
        return self._specs(self._named())

    def _specs(self, named: Mapping[str, torch.Tensor]) -> Manifest:
        return Manifest(tuple(self._spec(name, tensor) for name, tensor in named.items()))

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
            if (key := _identity(tensor)) not in seen:
                named[name] = tensor.detach()
            seen.add(key)
        return named


def _state(weights: nn.Module | Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    module: nn.Module = weights.module if isinstance(weights, nn.parallel.DistributedDataParallel) else weights
    for name, tensor in module.state_dict().items():
        yield ".".join(level for level in name.split(".") if level not in WRAPPER_LEVELS), tensor


def _identity(tensor: torch.Tensor) -> object:
    """Equal for two names of one tensor. The memory's identity, not its address: empty shards have no address."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    place = local.storage_offset(), tuple(local.shape), tuple(local.stride())
    return local.untyped_storage()._cdata, place, tuple(tensor.shape), tensor.dtype
