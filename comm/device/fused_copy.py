"""Many copies as one: within a device, or from memory of another that is mapped here (worker)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

# Measured on H200: 4.6 TB/s read and written, where torch._foreach_copy_ reaches 2.1; 375 GB/s from another GPU, where
# the copy engines reach 396. Larger chunks are no faster, and the last ones take longer to end.
CHUNK_BYTES = 1 << 16
THREADS = 1024
# From here on a copy of its own, by a copy engine, is worth the microseconds that pass between two of them; and from
# here on if others need the multiprocessors.
ENGINE_BYTES = 16 << 20
GENTLE_ENGINE_BYTES = 256 << 10
MEMCPY_DEFAULT = 4
Extents = Sequence[tuple[int, int, int]]
"""Target, source and bytes."""
KERNEL = r"""
extern "C" __global__ void copy_chunks(const unsigned long long* table) {
    // Target, source and bytes of one chunk.
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
    """Copies each source to its target, again and again; with one kernel what is contiguous on one CUDA device.

    Pairs are of one shape and dtype, and stay where they are.
    """

    def __init__(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        pairs = list(zip(targets, sources, strict=True))
        plain = [pair for pair in pairs if _is_plain(*pair)]
        others = [pair for pair in pairs if not _is_plain(*pair)]
        self._targets, self._sources = [target for target, _ in others], [source for _, source in others]
        self._chunks: torch.Tensor | None = None
        if plain:
            extents = [(target.data_ptr(), source.data_ptr(), target.nbytes) for target, source in plain]
            self._chunks = chunks(extents).to(plain[0][0].device)

    def run(self) -> None:
        """Copy, on the current stream."""
        if self._chunks is not None:
            copy_chunks(self._chunks)
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)


class Copies:
    """Copies (target, source, bytes) of device memory, some of it another GPU's, on one stream.

    Many small ones are one kernel. Large ones go to the copy engines, which are faster between two GPUs, and leave the
    multiprocessors to others. From the second time on all of them are one CUDA graph: each launch of their own would
    hand the interpreter to other threads for a while.
    """

    def __init__(self, extents: Extents, *, device: torch.device, stream: Any) -> None:
        self._extents = extents
        self._device = device
        self._stream = stream
        # For those that are gentle, and for the others.
        self._sorted: dict[bool, tuple[torch.Tensor | None, Extents]] = {}
        self._graphs: dict[bool, Any] = {}

    def run(self, *, gentle: bool) -> None:
        """Copy; `gentle` if others need the multiprocessors."""
        if self._device.type != "cuda":
            _memcpy(self._extents, self._stream.cuda_stream)
        elif gentle not in self._sorted:
            with torch.cuda.stream(self._stream):
                self._sorted[gentle] = self._sort(GENTLE_ENGINE_BYTES if gentle else ENGINE_BYTES)
                self._launch(*self._sorted[gentle], self._stream.cuda_stream)
        else:
            if gentle not in self._graphs:
                self._graphs[gentle] = self._record(*self._sorted[gentle])
            graph, external = self._graphs[gentle]
            graph.launch(external)

    def _sort(self, engine_bytes: int) -> tuple[torch.Tensor | None, Extents]:
        """The kernel's table, and what is left to the copy engines."""
        small = [its for its in self._extents if its[2] < engine_bytes and is_aligned(*its[:2])]
        kept = set(small)
        # Pinned, or the table would wait for the copies before it, and this thread with it.
        table = chunks(small).pin_memory().to(self._device, non_blocking=True) if small else None
        return table, [its for its in self._extents if its not in kept]

    def _launch(self, table: torch.Tensor | None, by_engine: Extents, stream: int) -> None:
        """On the current stream, which is `stream`."""
        if table is not None:
            copy_chunks(table)
        _memcpy(by_engine, stream)

    def _record(self, table: torch.Tensor | None, by_engine: Extents) -> Any:
        """The launches as a graph, and the stream as cupy has it."""
        # Torch's streams are a few, which take turns: ours may be one that others launch on meanwhile.
        recorder = _cupy().cuda.Stream(non_blocking=True)
        recorder.begin_capture()
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(recorder.ptr, device=self._device)):
                self._launch(table, by_engine, recorder.ptr)
        finally:
            graph = recorder.end_capture()
        return graph, _cupy().cuda.ExternalStream(self._stream.cuda_stream)


def _memcpy(extents: Extents, stream: int) -> None:
    from cupy.cuda import runtime  # pyright: ignore[reportMissingImports]  (CUDA machines only)

    for target, source, nbytes in extents:
        runtime.memcpyAsync(target, source, nbytes, MEMCPY_DEFAULT, stream)


def chunks(extents: Extents) -> torch.Tensor:
    """Cut copies (target, source, bytes) to pieces of at most `CHUNK_BYTES`: int64 [pieces, 3], on the CPU."""
    # numpy: torch would wake threads for it.
    target, source, nbytes = np.array(extents, dtype=np.int64).T
    counts = -(-nbytes // CHUNK_BYTES)
    whose = np.repeat(np.arange(len(counts)), counts)
    offset = (np.arange(len(whose)) - (np.cumsum(counts) - counts)[whose]) * CHUNK_BYTES
    pieces = target[whose] + offset, source[whose] + offset, np.minimum(nbytes[whose] - offset, CHUNK_BYTES)
    return torch.from_numpy(np.stack(pieces, 1))


def copy_chunks(table: torch.Tensor) -> None:
    """Make the copies of `chunks`, 16 bytes at a time, on the current stream of the table's device."""
    stream = _cupy().cuda.ExternalStream(torch.cuda.current_stream(table.device).cuda_stream)
    with stream:
        _kernel()((len(table),), (THREADS,), (table.data_ptr(),))


def is_aligned(*addresses: int) -> bool:
    """Whether `copy_chunks` may be used."""
    return all(address % 16 == 0 for address in addresses)


def _is_plain(*tensors: torch.Tensor) -> bool:
    return all(its.is_cuda and its.is_contiguous() and is_aligned(its.data_ptr()) for its in tensors)


@cache
def _kernel() -> Any:
    return _cupy().RawKernel(KERNEL, "copy_chunks")


def _cupy() -> Any:
    import cupy  # pyright: ignore[reportMissingImports]  (CUDA machines only)

    return cupy
