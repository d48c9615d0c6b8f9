"""Parts of a parameter that one trainer rank holds, and strided copies cut along them (both sides: pure functions)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import lt

from rollcast.comm.plan.region import Region


@dataclass(frozen=True, slots=True)
class Box:
    """A range of indices in each dimension of a parameter's full tensor, seen with `shape`."""

    shape: tuple[int, ...]
    """The parameter's shape, or another one of as many elements, in the same row-major order: (numel,) for a range of
    the flattened tensor, (groups, heads, head_dim, hidden) for some heads of each group."""
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.start) == len(self.stop):
            raise ValueError(f"shape, start and stop differ in length: {self}")
        for size, start, stop in zip(self.shape, self.start, self.stop, strict=True):
            if not 0 <= start <= stop <= size:
                raise ValueError(f"not a part of shape {list(self.shape)}: {self}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Return the box of all elements."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def extent(self) -> tuple[int, ...]:
        """Indices in each dimension."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.extent)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the full tensor, in elements."""
        return tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    def has(self, element: int) -> bool:
        """Return whether the box has this element, counted in the full tensor's memory."""
        for stride, start, stop in zip(self.strides, self.start, self.stop, strict=True):
            index, element = divmod(element, stride)
            if not start <= index < stop:
                return False
        return True

    def minus(self, other: "Box") -> "list[Box]":
        """Return disjoint boxes of the elements that are not in `other`, which has the same shape."""
        assert self.shape == other.shape
        low, high = _overlap(self, other)
        if any(start >= stop for start, stop in zip(low, high, strict=True)):
            return [self] if self.numel else []
        parts: list[Box] = []
        start, stop = list(self.start), list(self.stop)
        for dim in range(len(self.shape)):
            for first, last in ((start[dim], low[dim]), (high[dim], stop[dim])):
                if first < last:
                    ends = [(*start[:dim], first, *start[dim + 1 :]), (*stop[:dim], last, *stop[dim + 1 :])]
                    parts.append(Box(self.shape, *ends))
            start[dim], stop[dim] = low[dim], high[dim]
        return parts

    def common(self, other: "Box") -> "Box | None":
        """Return the elements that are in `other`, too, which has the same shape; None if there are none."""
        assert self.shape == other.shape
        low, high = _overlap(self, other)
        return Box(self.shape, low, high) if all(map(lt, low, high)) else None

    def __str__(self) -> str:
        ranges = ", ".join(f"{start}:{stop}" for start, stop in zip(self.start, self.stop, strict=True))
        return f"[{ranges}] of {list(self.shape)}"


def _overlap(one: Box, other: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(map(max, one.start, other.start)), tuple(map(min, one.stop, other.stop))


@dataclass(frozen=True, slots=True)
class Strided:
    """A copy between two strided regions of the same shape, as (size, source stride, target stride) by dimension."""

    dims: tuple[tuple[int, int, int], ...]
    source: int
    """Offset of the first element, in elements."""
    target: int

    @classmethod
    def of(cls, source: Region, target: Region) -> "Strided":
        """Return the copy from `source` to `target`."""
        assert source.shape == target.shape
        dims = tuple(zip(source.shape, source.stride, target.stride, strict=True))
        return cls(tuple(dim for dim in dims if dim[0] != 1), source.offset, target.offset)

    def regions(self, source: Region, target: Region) -> tuple[Region, Region]:
        """Return both sides, with the dtypes of these regions."""
        shape = tuple(size for size, _, _ in self.dims)
        return (
            Region(shape, tuple(stride for _, stride, _ in self.dims), self.source, source.dtype),
            Region(shape, tuple(stride for _, _, stride in self.dims), self.target, target.dtype),
        )

    def part(self, dim: int, start: int, count: int) -> "Strided":
        """Return `count` indices of one dimension from `start` on; a single one has no dimension."""
        _, source, target = self.dims[dim]
        kept = ((count, source, target),) if count > 1 else ()
        dims = (*self.dims[:dim], *kept, *self.dims[dim + 1 :])
        return Strided(dims, self.source + start * source, self.target + start * target)

    def folded(self, dim: int, inner: int) -> "Strided":
        """Return the same with one dimension as two, of which the second has size `inner`."""
        size, source, target = self.dims[dim]
        outer = ((size // inner, source * inner, target * inner),) if size > inner else ()
        return replace(self, dims=(*self.dims[:dim], *outer, (inner, source, target), *self.dims[dim + 1 :]))


def cut(copy: Strided, box: Box) -> list[Strided]:
    """Return the parts of a copy whose source elements are in the box, each element once."""
    parts = [copy]
    for size, stride, start, stop in zip(box.shape, box.strides, box.start, box.stop, strict=True):
        if (start, stop) != (0, size):
            low, high, period = start * stride, stop * stride, size * stride
            parts = [
                kept
                for part in parts
                for unwrapped in unwrap(part, period)
                for kept in _clip(unwrapped, period, low, high)
            ]
    return parts


def unwrap(copy: Strided, period: int) -> Iterator[Strided]:
    """Cut a copy so that in every part, dimensions whose source stride is no multiple of `period` stay in one period.

    A period is a range of `period` elements of the source, from a multiple of `period` on.
    """
    phase, inner = copy.source % period, _inner(copy, period)
    if phase + _span(copy, inner) < period:
        yield copy
        return
    dim = max(inner, key=lambda dim: copy.dims[dim][1])
    size, stride, _ = copy.dims[dim]
    start = 0
    while start < size:
        first = (phase + start * stride) % period
        count = min(-(-(period - first) // stride), size - start)
        folds = (size - start) // count if first < stride and count * stride == period else 1
        if folds > 1:
            yield from unwrap(copy.part(dim, start, folds * count).folded(dim, count), period)
            start += folds * count
            continue
        whole = copy.part(dim, start, count)
        rest = _span(whole, _inner(whole, period)) - (count - 1) * stride
        # The last index may reach into the next period by its smaller strides.
        if count > 1 and first + (count - 1) * stride + rest >= period:
            yield from unwrap(copy.part(dim, start, count - 1), period)
            yield from unwrap(copy.part(dim, start + count - 1, 1), period)
        else:
            yield from unwrap(whole, period)
        start += count


def _clip(copy: Strided, period: int, low: int, high: int) -> Iterator[Strided]:
    """Yield the parts of an unwrapped copy whose source elements are in [low, high) of their period."""
    phase, inner = copy.source % period, _inner(copy, period)
    span = _span(copy, inner)
    if low <= phase and phase + span < high:
        yield copy
    if (low <= phase and phase + span < high) or phase + span < low or phase >= high:
        return
    dim = max(inner, key=lambda dim: copy.dims[dim][1])
    size, stride, _ = copy.dims[dim]
    rest = span - (size - 1) * stride
    # Indices that are inside with all their smaller strides.
    first = max(0, -(-(low - phase) // stride))
    last = min(size, (high - 1 - rest - phase) // stride + 1)
    for index in range(max(0, -(-(low - rest - phase) // stride)), min(first, size)):
        yield from _clip(copy.part(dim, index, 1), period, low, high)
    if first < last:
        yield copy.part(dim, first, last - first)
    for index in range(max(last, first), min(size, -(-(high - phase) // stride))):
        yield from _clip(copy.part(dim, index, 1), period, low, high)


def _inner(copy: Strided, period: int) -> list[int]:
    """Return the dimensions that move the source within a period."""
    return [dim for dim, (_, stride, _) in enumerate(copy.dims) if stride % period]


def _span(copy: Strided, dims: Sequence[int]) -> int:
    return sum((copy.dims[dim][0] - 1) * copy.dims[dim][1] for dim in dims)


def localize(source: Region, box: Box, strides: Sequence[int]) -> list[tuple[Region, Region]]:
    """Return (local region, region of the contiguous wire tensor) of the parts of a source region inside the box.

    `strides` are those of the rank's own tensor, which has the box's extent; its regions have as few parts as these
    strides allow, for example one where the rank's tensor is contiguous in all but its first dimension.
    """
    wire = Region.whole(source.shape, source.dtype)
    return [part.regions(source, wire) for part in localize_copy(Strided.of(source, wire), box, strides)]


def localize_copy(copy: Strided, box: Box, strides: Sequence[int]) -> list[Strided]:
    """Return the parts of a copy, whose source elements are all in the box, with a tensor of the box as their source.

    `strides` are those of that tensor.
    """
    levels = _levels(box, strides)
    parts = [copy]
    for period, _, _ in levels:
        parts = [cut_part for part in parts for cut_part in unwrap(part, period)]
    return [_local(part, levels) for part in parts]


def _levels(box: Box, strides: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (full stride, local stride, first index) of the box's dimensions, those that are one in memory merged."""
    levels: list[tuple[int, int, int]] = []
    pairs = list(zip(box.shape, box.extent, box.strides, strides, box.start, strict=True))
    for size, extent, full, local, start in pairs:
        if levels and extent == size and levels[-1][1] == local * size and levels[-1][0] == full * size:
            levels[-1] = (full, local, levels[-1][2] * size)
        elif size > 1:
            levels.append((full, local, start))
    return levels


def _local(part: Strided, levels: Sequence[tuple[int, int, int]]) -> Strided:
    offset, rest = 0, part.source
    for full, local, start in levels:
        index, rest = divmod(rest, full)
        offset += (index - start) * local
    dims: list[tuple[int, int, int]] = []
    for size, stride, target in part.dims:
        full, local, _ = next((level for level in levels if stride % level[0] == 0), (1, 0, 0))
        dims.append((size, stride // full * local, target))
    return Strided(tuple(dims), offset, part.target)
