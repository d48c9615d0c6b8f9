"""Many copies launched as one: within a CUDA device, or from another one's memory that is mapped here (vLLM worker)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

# Measured on H200: 4.6 TB/s read and written, where torch._foreach_copy_ reaches 2.1; 375 GB/s from another GPU, where
# the copy engines reach 396. Larger chunks are no faster, and the last ones take longer to end.
CHUNK_BYTES = 1 << 16
THREADS = 1024
# Copies of at least this size use cudaMemcpyAsync instead of the kernel: they are worth the microseconds between two
# launches. At low priority smaller ones do too: the multiprocessors are the engine's.
MEMCPY_BYTES = 16 << 20
LOW_PRIORITY_MEMCPY_BYTES = 256 << 10
# cudaMemcpyDefault: CUDA infers the direction from the addresses.
MEMCPY_DEFAULT = 4
MemcpyList = Sequence[tuple[int, int, int]]
"""Copies of raw memory: (target address, source address, bytes) of each."""
KERNEL = r"""
extern "C" __global__ void copy_chunks(const unsigned long long* table) {
    // One row of `chunks`: target, source, bytes.
    const unsigned long long* chunk = table + 3ull * blockIdx.x;
    uint4* target = (uint4*)chunk[0];
    const uint4* source = (const uint4*)chunk[1];
    const unsigned long long nbytes = chunk[2], words = nbytes / 16;
    unsigned long long i = threadIdx.x;
    for (; i + 3 * blockDim.x < words; i += 4 * blockDim.x) {
        uint4 a = __ldcs(source + i), b = __ldcs(source + i + blockDim.x);
        uint4 c = __ldcs(source + i + 2 * blockDim.x), d = __ldcs(source + i + 3 * blockDim.x);
        __stcs(target + i, a);
        __stcs(target + i + blockDim.x, b);
        __stcs(target + i + 2 * blockDim.x, c);
        __stcs(target + i + 3 * blockDim.x, d);
    }
    for (; i < words; i += blockDim.x) target[i] = source[i];
    for (unsigned long long j = 16 * words + threadIdx.x; j < nbytes; j += blockDim.x)
        ((char*)target)[j] = ((const char*)source)[j];
}
"""


class FusedCopy:
    """Repeatable copies of sources to targets: one kernel for all pairs that are contiguous on one CUDA device.

    The two tensors of a pair have one shape and dtype. All keep their memory for as long as this is used.
    """

    def __init__(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        pairs = list(zip(targets, sources, strict=True))
        fused = [pair for pair in pairs if _is_fusible(*pair)]
        others = [pair for pair in pairs if not _is_fusible(*pair)]
        self._targets, self._sources = [target for target, _ in others], [source for _, source in others]
        self._chunks: torch.Tensor | None = None
        if fused:
            copies = [(target.data_ptr(), source.data_ptr(), target.nbytes) for target, source in fused]
            self._chunks = chunks(copies).to(fused[0][0].device)

    def run(self) -> None:
        """Copy, on the current stream."""
        if self._chunks is not None:
            copy_chunks(self._chunks)
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)


class GraphCopy:
    """Repeatable copies of device memory, some of it another GPU's, on one stream.

    Many small copies are one kernel. Large ones go to the copy engines, which are faster between two GPUs and leave the
    multiprocessors to others. From its second run on, all of it is one CUDA graph: every single launch would release
    the interpreter lock and might wait for other threads to get it back.
    """

    def __init__(self, copies: MemcpyList, *, device: torch.device, stream: Any) -> None:
        self._copies = copies
        self._device = device
        self._stream = stream
        # Both by `low_priority`, which decides between kernel and copy engines.
        self._split: dict[bool, tuple[torch.Tensor | None, MemcpyList]] = {}
        self._graphs: dict[bool, Any] = {}

    def run(self, *, low_priority: bool) -> None:
        """Copy; with `low_priority`, leave the multiprocessors to others."""
        if self._device.type != "cuda":
            _memcpy(self._copies, self._stream.cuda_stream)
        elif low_priority not in self._split:
            with torch.cuda.stream(self._stream):
                self._split[low_priority] = self._split_at(LOW_PRIORITY_MEMCPY_BYTES if low_priority else MEMCPY_BYTES)
                self._launch(*self._split[low_priority], self._stream.cuda_stream)
        else:
            if low_priority not in self._graphs:
                self._graphs[low_priority] = self._capture(*self._split[low_priority])
            graph, external = self._graphs[low_priority]
            graph.launch(external)

    def _split_at(self, memcpy_bytes: int) -> tuple[torch.Tensor | None, MemcpyList]:
        """Return the kernel's table, and the copies that are left to the copy engines."""
        small = [copy for copy in self._copies if copy[2] < memcpy_bytes and _is_aligned(*copy[:2])]
        fused = set(small)
        # Pinned, or the table's own copy would wait for the copies before it on the stream, and this thread with it.
        table = chunks(small).pin_memory().to(self._device, non_blocking=True) if small else None
        return table, [copy for copy in self._copies if copy not in fused]

    def _launch(self, table: torch.Tensor | None, by_engine: MemcpyList, stream: int) -> None:
        """Launch the kernel and the copies on `stream`, which is the current one."""
        if table is not None:
            copy_chunks(table)
        _memcpy(by_engine, stream)

    def _capture(self, table: torch.Tensor | None, by_engine: MemcpyList) -> Any:
        """Return the launches as a CUDA graph, and cupy's object for the stream."""
        # Captured on a stream of cupy's: torch hands out its few streams in turn, so another thread may launch on ours.
        recorder = _cupy().cuda.Stream(non_blocking=True)
        recorder.begin_capture()
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(recorder.ptr, device=self._device)):
                self._launch(table, by_engine, recorder.ptr)
        finally:
            graph = recorder.end_capture()
        return graph, _cupy().cuda.ExternalStream(self._stream.cuda_stream)


def _memcpy(copies: MemcpyList, stream: int) -> None:
    from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]  (CUDA machines only)

    for target, source, nbytes in copies:
        runtime.memcpyAsync(target, source, nbytes, MEMCPY_DEFAULT, stream)


def chunks(copies: MemcpyList) -> torch.Tensor:
    """Cut copies into chunks of at most `CHUNK_BYTES`: int64 [chunks, 3] of (target, source, bytes), on the CPU."""
    # In numpy: torch would wake its thread pool for this.
    target, source, nbytes = np.array(copies, dtype=np.int64).T
    counts = -(-nbytes // CHUNK_BYTES)
    owner = np.repeat(np.arange(len(counts)), counts)
    offset = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * CHUNK_BYTES
    columns = target[owner] + offset, source[owner] + offset, np.minimum(nbytes[owner] - offset, CHUNK_BYTES)
    return torch.from_numpy(np.stack(columns, 1))


def copy_chunks(table: torch.Tensor) -> None:
    """Make the copies of a table of `chunks`, 16 bytes at a time, on the current stream of the table's device."""
    stream = _cupy().cuda.ExternalStream(torch.cuda.current_stream(table.device).cuda_stream)
    with stream:
        _kernel()((len(table),), (THREADS,), (table.data_ptr(),))


def _is_aligned(*addresses: int) -> bool:
    """Return whether `copy_chunks` can copy from and to these addresses."""
    return all(address % 16 == 0 for address in addresses)


def _is_fusible(*tensors: torch.Tensor) -> bool:
    return all(tensor.is_cuda and tensor.is_contiguous() and _is_aligned(tensor.data_ptr()) for tensor in tensors)


@cache
def _kernel() -> Any:
    return _cupy().RawKernel(KERNEL, "copy_chunks")


def _cupy() -> Any:
    import cupy  # pyright: ignore[reportMissingImports]  (CUDA machines only)

    return cupy
