"""Ceilings of the machine: bandwidth between the two GPUs, and of one GPU's memory (trainer)."""

import statistics
import time
from typing import Any

import torch

from latency.bench import Bench
from latency.methods import broadcast

SIZES = tuple(1 << power for power in range(20, 33, 2))
CPU_SIZES = (1 << 16, 1 << 20)
COPY_BYTES = 1 << 30
CPU_COPY_BYTES = 1 << 24
WARM_UPS = 2
REPEATS = 10


def ceilings(bench: Bench) -> dict[str, Any]:
    """Measure raw broadcasts of one buffer at several sizes, and a copy within one device; decimal GB/s."""
    on_cpu = bench.device.type == "cpu"
    sizes = CPU_SIZES if on_cpu else SIZES
    buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=bench.device)
    try:
        wire = [wire_row(bench, buffer, size) for size in sizes]
    finally:
        bench.close_group()
    bench.reset_peak()
    copied = copy_gb_per_s(bench, CPU_COPY_BYTES if on_cpu else COPY_BYTES)
    return {"raw_broadcast": wire, "device_copy_gb_per_s": copied}


def wire_row(bench: Bench, buffer: torch.Tensor, size: int) -> dict[str, Any]:
    """Measure broadcasts of one size."""
    times = [broadcast(bench, sizes=[size], buffer=buffer, call=False).seconds for _ in range(WARM_UPS + REPEATS)]
    p50 = statistics.median(times[WARM_UPS:])
    return {"bytes": size, "p50_s": p50, "gb_per_s": size / 1e9 / p50}


def copy_gb_per_s(bench: Bench, size: int) -> float:
    """Measure the bytes copied in a second: each is read once and written once."""
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.zeros_like(source)

    def copy_s() -> float:
        start = time.perf_counter()
        target.copy_(source)
        bench.synchronize()
        return time.perf_counter() - start

    times = [copy_s() for _ in range(WARM_UPS + REPEATS)]
    return size / 1e9 / statistics.median(times[WARM_UPS:])
