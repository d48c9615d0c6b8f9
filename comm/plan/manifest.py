"""Name, shape and dtype of every weight that a sync sends, in order (both sides)."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Name, shape and dtype of one checkpoint parameter, as the trainer names it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In a trainer's manifest, its own; in those of plans, that of the wire."""

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
    """The specs of all parameters of a model, in the order in which a `WeightSource` iterates over them."""

    specs: tuple[ParamSpec, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.specs:
            if spec.name in seen:
                raise ValueError(f"parameter {spec.name} is listed twice")
            seen.add(spec.name)

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of `to_bytes()`: equal digests mean equal manifests."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Encode the manifest as JSON."""
        return json.dumps([[s.name, s.shape, str(s.dtype).removeprefix("torch.")] for s in self.specs]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Decode what `to_bytes` encoded."""
        rows = json.loads(data)
        return cls(tuple(ParamSpec(name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in rows))

    def difference(self, other: "Manifest") -> str | None:
        """Describe the first parameter in which `other` differs; None when the two are equal."""
        if other is self:
            return None
        for mine, theirs in zip(self.specs, other.specs, strict=False):
            if mine != theirs:
                return f"expected {mine}, got {theirs}"
        if len(self.specs) != len(other.specs):
            longer, what = (self, "missing") if len(self.specs) > len(other.specs) else (other, "extra")
            return f"{what} {longer.specs[min(len(self.specs), len(other.specs))]}"
        return None
