"""Checksums of what several trainer ranks hold of the same parameters (every trainer rank)."""

from collections.abc import Iterator, Sequence

import torch

from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import flat_bytes
from rollcast.comm.plan.box import Box
from rollcast.comm.plan.holders import Overlap
from rollcast.comm.plan.manifest import Manifest, ParamSpec
from rollcast.comm.transfer.source import WeightSource

# Elements that are cast and copied at a time.
CHUNK_NUMEL = 1 << 24


def replica_checksums(source: WeightSource, manifest: Manifest, overlaps: Sequence[Overlap]) -> dict[int, list[int]]:
    """Return the checksums of this rank's tensors, as they would be sent, by index of the overlap.

    `manifest` is the transfer plan's, with the dtypes of the wire. Every rank that holds an overlap must get the same
    numbers for it. Collective if the source gathers. Raises `ValueError` for weights that no longer match theirs.
    """
    index = {spec.name: number for number, spec in enumerate(source.manifest.specs)}
    numbers: dict[int, list[int]] = {}
    for number, overlap in enumerate(overlaps):
        if (param := index.get(manifest.specs[overlap.param].name)) is not None:
            numbers.setdefault(param, []).append(number)
    boxes = [held.boxes for held in source.statement]
    sums: dict[int, list[torch.Tensor]] = {}
    for param, tensors in source.gather(sorted(numbers)):
        for number in numbers[param]:
            spec = manifest.specs[overlaps[number].param]
            for box, tensor in zip(boxes[param], tensors, strict=True):
                if (part := _part(spec, box, tensor, overlaps[number].box)) is not None:
                    sums.setdefault(number, []).append(_sum(part, spec.dtype))
    # One wait for all of them.
    return {number: torch.stack(each).tolist() for number, each in sums.items()}


def _part(spec: ParamSpec, box: Box, tensor: torch.Tensor, cell: Box) -> torch.Tensor | None:
    """Return the elements of the cell; None if the tensor, which has the elements of the box, has not all of them."""
    if box.numel == spec.numel:
        box, tensor = Box.whole(cell.shape), tensor.reshape(cell.shape)
    if box.common(cell) != cell:
        return None
    for dim, (first, start, extent) in enumerate(zip(box.start, cell.start, cell.extent, strict=True)):
        tensor = tensor.narrow(dim, start - first, extent)
    return tensor


def _sum(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    sums = [checksum(flat_bytes(chunk.to(dtype))) for chunk in _chunks(part)]
    return checksum(flat_bytes(torch.stack(sums)))


def _chunks(part: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor in pieces along its first dimension; which ones depends on its shape alone."""
    rows = part if part.dim() else part[None]
    yield from rows.split(max(CHUNK_NUMEL * len(rows) // max(rows.numel(), 1), 1))
