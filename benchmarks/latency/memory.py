"""GPU memory of this process and its peak (trainer and workers of the latency benchmark)."""

import gc

import torch


def reset_peak() -> None:
    """Free unused memory and start a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Return the most bytes in use on this GPU since `reset_peak`: torch's peak, and what others (NCCL) hold now."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
