"""GPU memory of this process, peaks included (trainer and workers of the latency benchmark)."""

import gc

import torch


def settle() -> None:
    """Give unused memory back and start to watch for the next peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most bytes in use on this GPU since `settle`: torch's peak, and what others, such as NCCL, hold now."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
