"""Move bytes between ranks: one `Group` interface over NCCL, CUDA IPC and gloo (both sides)."""
