"""Device memory that other processes can map, described for them (both sides of CUDA IPC; needs cupy)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import torch
from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]  (CUDA machines only)

from rollcast.comm.transport.base import TensorError

# CUpointer_attribute of the driver's API.
BUFFER_ID, LEGACY_IPC_CAPABLE, RANGE_START, RANGE_SIZE = 7, 10, 11, 12
# The driver puts smaller allocations together in one block, and an IPC handle exports the whole block.
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Allocation:
    """The memory of one `cudaMalloc`."""

    start: int
    """Device address."""
    nbytes: int
    number: int
    """CUDA's buffer id, unique in the process: memory that is freed and allocated again gets another."""
    exportable: bool
    """Whether another process can map it. Memory of torch's expandable segments cannot be mapped this way."""


class IpcBuffers(msgspec.Struct, frozen=True, array_like=True):
    """The tensors of one broadcast, as another process can map them."""

    allocations: list[tuple[bytes, int, int, int]]
    """(CUDA IPC handle, address at the sender, bytes, `Allocation.number`) of each."""
    parts: list[tuple[int, int, int]]
    """(index of its allocation, first byte in it, bytes) of each tensor."""


def check_allocations(buffers: IpcBuffers) -> None:
    """Raise `TensorError` if memory was freed since `buffers` was made, whatever is at its addresses now."""
    for allocated, (_, start, _, number) in enumerate(buffers.allocations):
        if allocation_number(start) != number:
            tensor = next(index for index, part in enumerate(buffers.parts) if part[0] == allocated)
            raise TensorError(tensor, "is in other memory than at the last sync, at the same address: sync again")


class HandleCache:
    """CUDA IPC handles of this process's allocations, each asked for once and kept while the allocation lives."""

    def __init__(self) -> None:
        # Address of an allocation -> (number, handle).
        self._handles: dict[int, tuple[int, bytes]] = {}

    def describe(self, tensors: Sequence[torch.Tensor]) -> IpcBuffers | None:
        """Return the tensors (flat uint8) as `IpcBuffers`; None if one is in memory that other processes cannot map."""
        indices: dict[int, int] = {}
        allocations: list[tuple[bytes, int, int, int]] = []
        parts: list[tuple[int, int, int]] = []
        current = Allocation(0, 0, 0, exportable=True)
        for tensor in tensors:
            address, nbytes = tensor.data_ptr(), tensor.numel()
            # Neighbours mostly share an allocation: the driver is asked only when one does not.
            if not current.start <= address < current.start + current.nbytes:
                current = allocation(address)
                if not current.exportable:
                    return None
                if current.start not in indices:
                    indices[current.start] = len(allocations)
                    allocations.append((self._handle(current), current.start, current.nbytes, current.number))
            parts.append((indices[current.start], address - current.start, nbytes))
        return IpcBuffers(allocations, parts)

    def _handle(self, memory: Allocation) -> bytes:
        number, handle = self._handles.get(memory.start, (None, b""))
        if number != memory.number:
            handle = runtime.ipcGetMemHandle(memory.start)
            self._handles[memory.start] = memory.number, handle
        return handle


def allocation(address: int) -> Allocation:
    """Return the allocation that a device address belongs to."""
    nbytes = _attribute(RANGE_SIZE, address, ctypes.c_size_t)
    capable = bool(_attribute(LEGACY_IPC_CAPABLE, address, ctypes.c_int))
    start, number = (_attribute(attribute, address, ctypes.c_uint64) for attribute in (RANGE_START, BUFFER_ID))
    return Allocation(start, nbytes, number, capable and nbytes >= BLOCK_BYTES)


def allocation_number(address: int) -> int:
    """Return `allocation(address).number`, in a quarter of the time."""
    return _attribute(BUFFER_ID, address, ctypes.c_uint64)


def exportable_bytes(count: int) -> torch.Tensor:
    """Allocate flat uint8 memory on the current device with a `cudaMalloc` of its own.

    It is exportable, however torch's allocator is configured.
    """
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
