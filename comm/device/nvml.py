"""What NVIDIA's management library knows of a GPU: its identity, memory, links and their traffic (any process)."""

import socket
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

KIB = 1024
# NVML's scope for "all links of the GPU together".
ALL_LINKS = 0xFFFFFFFF
NVLINK = "NVLink"


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU at one moment."""

    used_bytes: int
    free_bytes: int
    nvlink_received_bytes: int | None
    """Since the driver was loaded; None where the GPU has no NVLink counters."""
    nvlink_sent_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuReport:
    """What a sync did to one GPU."""

    rank: int
    """Number of the worker among those of all engines, from 1; 0: the trainer's."""
    used_bytes: int
    """Of its memory, by all processes, after the sync."""
    free_bytes: int
    nvlink_received_bytes: int | None
    """During the sync, by everything that ran on the GPU."""
    nvlink_sent_bytes: int | None

    @classmethod
    def between(cls, rank: int, before: GpuState, after: GpuState) -> "GpuReport":
        """The difference of two states."""
        received = _difference(before.nvlink_received_bytes, after.nvlink_received_bytes)
        sent = _difference(before.nvlink_sent_bytes, after.nvlink_sent_bytes)
        return cls(rank, after.used_bytes, after.free_bytes, received, sent)


def gpu_uuid(device: torch.device) -> str:
    """UUID of one of torch's CUDA devices, as nvidia-smi shows it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def gpu_state(uuid: str) -> GpuState:
    """Memory and NVLink counters of a GPU, now."""
    nvml, handle = _nvml(), _handle(uuid)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    fields = (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX)
    received, sent = (_counter(handle, field) for field in fields)
    return GpuState(memory.used, memory.free, received, sent)


def gpu_link(first: str, second: str) -> str:
    """How two GPUs of this machine are joined: "same GPU", `NVLINK`, or the part of the PCIe tree between them."""
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
    """UUIDs of this machine's GPUs, in the driver's order. Creates no CUDA context. Raises `OSError` without any."""
    nvml = _nvml()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]


@cache
def _nvml() -> Any:
    """The library, started. Raises `OSError` with what is missing."""
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
    """A link counter, which NVML keeps in KiB."""
    (value,) = _nvml().nvmlDeviceGetFieldValues(handle, [(field, ALL_LINKS)])
    return value.value.ullVal * KIB if value.nvmlReturn == 0 else None


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
