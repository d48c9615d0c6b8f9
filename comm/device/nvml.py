"""GPUs as NVIDIA's management library sees them: identity, memory, links and their traffic (any process)."""

import socket
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

KIB = 1024
# NVML's scope id for the sum over all links of a GPU.
ALL_LINKS = 0xFFFFFFFF
NVLINK = "NVLink"


@dataclass(frozen=True, slots=True)
class GpuState:
    """The memory and NVLink counters of one GPU at one moment."""

    used_bytes: int
    free_bytes: int
    nvlink_received_bytes: int | None
    """Since the driver was loaded; None where the GPU has no NVLink counters."""
    nvlink_sent_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One GPU after a sync, and the traffic during it."""

    rank: int
    """Number of the worker among those of all engines, from 1; 0 is the trainer."""
    used_bytes: int
    """Memory used by all processes, after the sync."""
    free_bytes: int
    nvlink_received_bytes: int | None
    """During the sync, by all processes on the GPU."""
    nvlink_sent_bytes: int | None

    @classmethod
    def between(cls, rank: int, before: GpuState, after: GpuState) -> "GpuReport":
        """Return the report of a sync from the GPU's states before and after it."""
        received = _difference(before.nvlink_received_bytes, after.nvlink_received_bytes)
        sent = _difference(before.nvlink_sent_bytes, after.nvlink_sent_bytes)
        return cls(rank, after.used_bytes, after.free_bytes, received, sent)


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of one of torch's CUDA devices, as nvidia-smi shows it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def gpu_state(uuid: str) -> GpuState:
    """Return the memory and NVLink counters of a GPU, as they are now."""
    nvml, handle = _nvml(), _handle(uuid)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    fields = (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX)
    received, sent = (_counter(handle, field) for field in fields)
    return GpuState(memory.used, memory.free, received, sent)


def gpu_link(first: str, second: str) -> str:
    """Return how two GPUs of this machine are linked: "same GPU", `NVLINK`, or the part of the PCIe tree between."""
    if first == second:
        return "same GPU"
    nvml = _nvml()
    handles = _handle(first), _handle(second)
    if nvml.nvmlDeviceGetP2PStatus(*handles, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
        return NVLINK
    levels = {
        nvml.NVML_TOPOLOGY_INTERNAL: "one board",
        nvml.NVML_TOPOLOGY_SINGLE: "one PCIe switch",
        nvml.NVML_TOPOLOGY_MULTIPLE: "PCIe switches",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "a PCIe host bridge",
        nvml.NVML_TOPOLOGY_NODE: "PCIe across one NUMA node",
    }
    return levels.get(nvml.nvmlDeviceGetTopologyCommonAncestor(*handles), "PCIe across NUMA nodes")


def visible_gpus() -> list[str]:
    """Return the UUIDs of this machine's GPUs, in the driver's order, without creating a CUDA context.

    Raises `OSError` where there is no driver.
    """
    nvml = _nvml()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]


@cache
def _nvml() -> Any:
    """Return NVML, initialized. Raises `OSError` naming what is missing."""
    try:
        import pynvml
    except ImportError:
        raise OSError("device 'cuda' needs the package nvidia-ml-py: install rollcast[cuda]") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise OSError(f"not enough GPUs on {socket.gethostname()}: no NVIDIA driver ({error})") from None
    return pynvml


@cache
def _handle(uuid: str) -> Any:
    return _nvml().nvmlDeviceGetHandleByUUID(uuid)


def _counter(handle: Any, field: int) -> int | None:
    """Return a link counter in bytes (NVML counts KiB); None where the GPU has none."""
    (value,) = _nvml().nvmlDeviceGetFieldValues(handle, [(field, ALL_LINKS)])
    return value.value.ullVal * KIB if value.nvmlReturn == 0 else None


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
