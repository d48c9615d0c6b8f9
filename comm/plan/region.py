"""A strided part of a tensor as data: what `torch.as_strided` takes (both sides)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of a tensor that `shape`, `stride` and `offset` select.

    Strides and offset count elements of `dtype` from the tensor's own first element, so a region of one tensor can be
    applied to any other tensor of the same layout.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, part: torch.Tensor, *, base_offset_bytes: int = 0) -> "Region":
        """Return `part` as a region of the tensor that starts `base_offset_bytes` into the same storage."""
        offset_bytes = part.storage_offset() * part.element_size() - base_offset_bytes
        assert offset_bytes % part.element_size() == 0
        return cls(tuple(part.shape), tuple(part.stride()), offset_bytes // part.element_size(), part.dtype)

    @classmethod
    def whole(cls, shape: Sequence[int], dtype: torch.dtype) -> "Region":
        """Return the region of all elements of a contiguous tensor."""
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return cls(tuple(shape), tuple(strides), 0, dtype)

    def flat(self) -> "Region":
        """Return the same elements in one dimension. Contiguous regions only."""
        assert self.is_contiguous
        return Region((self.numel,), (1,), self.offset, self.dtype)

    def rows(self, start: int, count: int) -> "Region":
        """Return at most `count` rows (indices of the first dimension) from `start` on."""
        count = min(count, self.shape[0] - start)
        offset = self.offset + start * self.stride[0]
        return Region((count, *self.shape[1:]), self.stride, offset, self.dtype)

    def row(self) -> "Region":
        """Return the only row, without the first dimension."""
        assert self.shape[0] == 1
        return Region(self.shape[1:], self.stride[1:], self.offset, self.dtype)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are adjacent in memory, in row-major order."""
        if self.numel == 0:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this region of `tensor` as a view that shares its memory."""
        if tensor.dtype != self.dtype:
            raise ValueError(f"a region of {self.dtype} cannot view a tensor of {tensor.dtype}")
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def bytes_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this region of `tensor` as a flat uint8 view of its bytes. Contiguous regions only."""
        return self.flat().view(tensor).view(torch.uint8)
