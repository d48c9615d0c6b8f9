"""A strided part of a tensor, as data (both sides)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class Region:
    """Elements of a tensor picked by `shape`, `stride` and `offset`.

    Strides and offset count elements of `dtype` from the tensor's own first element, so a region made on one
    tensor can be bound to any other tensor of the same layout.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, part: torch.Tensor, *, base_offset_bytes: int = 0) -> "Region":
        """The region that `part` is, relative to a tensor that starts `base_offset_bytes` into its storage."""
        offset_bytes = part.storage_offset() * part.element_size() - base_offset_bytes
        assert offset_bytes % part.element_size() == 0
        return cls(tuple(part.shape), tuple(part.stride()), offset_bytes // part.element_size(), part.dtype)

    @classmethod
    def whole(cls, shape: Sequence[int], dtype: torch.dtype) -> "Region":
        """All of a contiguous tensor."""
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return cls(tuple(shape), tuple(strides), 0, dtype)

    def flat(self) -> "Region":
        """The same elements in one dimension. Contiguous regions only."""
        assert self.is_contiguous
        return Region((self.numel,), (1,), self.offset, self.dtype)

    def rows(self, start: int, count: int) -> "Region":
        """At most `count` rows (indices of the first dimension) from `start` on."""
        count = min(count, self.shape[0] - start)
        offset = self.offset + start * self.stride[0]
        return Region((count, *self.shape[1:]), self.stride, offset, self.dtype)

    def row(self) -> "Region":
        """The only row, without the dimension that counts rows."""
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
        """Whether the elements follow each other without a gap, in order."""
        if self.numel == 0:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bind the region to `tensor`: a view that shares its memory."""
        if tensor.dtype != self.dtype:
            raise ValueError(f"a region of {self.dtype} cannot view a tensor of {tensor.dtype}")
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def bytes_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The region's bytes in `tensor`: a flat uint8 view. Contiguous regions only."""
        return self.flat().view(tensor).view(torch.uint8)
