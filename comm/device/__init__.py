"""Helpers for GPU and tensor memory: fused copies, checksums, NVML, storage identity (any process)."""
