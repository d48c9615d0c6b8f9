"""Helpers for GPU and tensor memory: fused copies, checksums, NVML, whether a storage moved (any process)."""
