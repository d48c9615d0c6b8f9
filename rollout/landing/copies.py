"""Reading through a copy: which part of the original a part of it is (worker)."""

from rollcast.comm import Region


def through_copy(original: Region, copy: Region, part: Region) -> Region | None:
    """The region of the original that `part` of a copy of it holds; None where it is not strided."""
    dims: list[tuple[int, int, int]] = []
    by_stride = sorted(zip(copy.shape, copy.stride, original.stride, strict=True), key=lambda dim: -dim[1])
    for size, stride, origin in by_stride:
        if size == 1:
            continue
        if dims and (dims[-1][1], dims[-1][2]) == (size * stride, size * origin):
            size *= dims.pop()[0]
        dims.append((size, stride, origin))
    offset, rest = original.offset, part.offset - copy.offset
    reached: list[int] = []
    for _, stride, origin in dims:
        steps, rest = divmod(rest, stride)
        reached.append(steps)
        offset += steps * origin
    strides: list[int] = []
    for size, stride in zip(part.shape, part.stride, strict=True):
        if size == 1 or stride == 0:
            strides.append(0)
            continue
        for index, (length, step, origin) in enumerate(dims):
            if stride % step == 0 and reached[index] + stride // step * (size - 1) < length:
                reached[index] += stride // step * (size - 1)
                strides.append(stride // step * origin)
                break
        else:
            return None
    return None if rest else Region(part.shape, tuple(strides), offset, original.dtype)
