"""CUDA beyond torch: waiting with a deadline, and memory that other processes can map (both sides)."""

import ctypes
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from rollcast.comm.deadline import Deadline, nap

# How often a wait that has become long asks whether it is in vain.
ASK_S = 0.25

# CUpointer_attribute of the driver's API.
BUFFER_ID, LEGACY_IPC_CAPABLE, RANGE_START, RANGE_SIZE = 7, 10, 11, 12
# What is smaller shares a block of the driver's with others, and its handle with them.
BLOCK_BYTES = 2 << 20


class Leavable(Protocol):
    """A group that ranks can leave."""

    closed: bool
    """Whether this rank has."""
    gentle: bool
    """See `Group`."""

    def left_by(self) -> str | None:
        """Another rank that has left, if any."""
        ...


class EventWork:
    """Copies under way on a stream of ours, until an event."""

    def __init__(self, done: torch.cuda.Event, *, what: str, group: Leavable) -> None:
        self._done = done
        self._what = what
        self._group = group

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. The host waits, with a deadline: only it can tell a slow peer from a lost one."""
        start = asked = time.perf_counter()
        while not self._done.query():
            if self._group.closed:
                raise RuntimeError(f"the weight group was closed while {self._what} was under way")
            if time.perf_counter() - asked > ASK_S:
                if peer := self._group.left_by():
                    raise RuntimeError(f"{peer} left the weight group while {self._what} was under way")
                asked = time.perf_counter()
            deadline.left(self._what)
            nap(start, gentle=self._group.gentle)


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one `cudaMalloc` gave."""

    start: int
    nbytes: int
    number: int
    """Unique in the process: memory that is freed and given again has another."""
    exportable: bool
    """Whether another process can map it. Memory of torch's expandable segments cannot be mapped this way."""


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
