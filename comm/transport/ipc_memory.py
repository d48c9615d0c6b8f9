"""Where the bytes of a broadcast are, for processes that can map the memory (the sender of CUDA IPC; needs cupy)."""

from collections.abc import Sequence

import msgspec
import torch
from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]  (CUDA machines only)

from rollcast.comm.transport.cuda_event import Allocation, allocation, allocation_number


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Where the bytes of one broadcast are."""

    allocations: list[tuple[bytes, int, int, int]]
    """CUDA IPC handle, address at the sender, bytes, and the sender's number of it."""
    parts: list[tuple[int, int, int]]
    """Of each tensor: index of its allocation, first byte in it, bytes."""


def check(offer: Offer) -> None:
    """Raises `RuntimeError` if memory was freed since the offer was made, whatever is at its addresses now."""
    for _, start, _, number in offer.allocations:
        if allocation_number(start) != number:
            raise RuntimeError("the weights are in other memory than at the last sync, at the same address: sync again")


class Surveyor:
    """Makes offers. Handles of allocations are kept for as long as these live."""

    def __init__(self) -> None:
        # By address: number and handle.
        self._handles: dict[int, tuple[int, bytes]] = {}

    def offer(self, tensors: Sequence[torch.Tensor]) -> Offer | None:
        """Where the tensors are; None if one is in memory that others cannot map."""
        indices: dict[int, int] = {}
        found: list[tuple[bytes, int, int, int]] = []
        parts: list[tuple[int, int, int]] = []
        place = Allocation(0, 0, 0, exportable=True)
        for tensor in tensors:
            address, nbytes = tensor.data_ptr(), tensor.numel()
            if not place.start <= address < place.start + place.nbytes:
                place = allocation(address)
                if not place.exportable:
                    return None
                if place.start not in indices:
                    indices[place.start] = len(found)
                    found.append((self._handle(place), place.start, place.nbytes, place.number))
            parts.append((indices[place.start], address - place.start, nbytes))
        return Offer(found, parts)

    def _handle(self, place: Allocation) -> bytes:
        number, handle = self._handles.get(place.start, (None, b""))
        if number != place.number:
            handle = runtime.ipcGetMemHandle(place.start)
            self._handles[place.start] = place.number, handle
        return handle
