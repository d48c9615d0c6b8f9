"""Where the bytes of a broadcast are, for processes that can map the memory (the sender of CUDA IPC; needs cupy)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import torch
from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]  (CUDA machines only)

# CUpointer_attribute of the driver's API.
BUFFER_ID, LEGACY_IPC_CAPABLE, RANGE_START, RANGE_SIZE = 7, 10, 11, 12
# What is smaller shares a block of the driver's with others, and its handle with them.
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one `cudaMalloc` gave."""

    start: int
    nbytes: int
    number: int
    """Unique in the process: memory that is freed and given again has another."""
    exportable: bool
    """Whether another process can map it. Memory of torch's expandable segments cannot be mapped this way."""


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


def allocation(address: int) -> Allocation:
    """The allocation that a device address belongs to."""
    nbytes = _attribute(RANGE_SIZE, address, ctypes.c_size_t)
    capable = bool(_attribute(LEGACY_IPC_CAPABLE, address, ctypes.c_int))
    start, number = (_attribute(its, address, ctypes.c_uint64) for its in (RANGE_START, BUFFER_ID))
    return Allocation(start, nbytes, number, capable and nbytes >= BLOCK_BYTES)


def allocation_number(address: int) -> int:
    """`Allocation.number` of the allocation that a device address belongs to; takes a quarter of the time."""
    return _attribute(BUFFER_ID, address, ctypes.c_uint64)


def exportable_bytes(count: int) -> torch.Tensor:
    """Flat uint8 memory on the current device, of its own `cudaMalloc`: exportable, whatever torch's allocator does."""
    import cupy  # pyright: ignore[reportMissingImports]  (CUDA machines only)

    memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(max(count, BLOCK_BYTES)), 0)
    return torch.as_tensor(cupy.ndarray((count,), dtype=cupy.uint8, memptr=memory), device="cuda")


def _attribute(attribute: int, address: int, kind: Any) -> int:
    value = kind()
    result = _driver().cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(address))
    if result:
        raise RuntimeError(f"CUDA error {result}: {address:#x} is no device memory of this process")
    return value.value


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
