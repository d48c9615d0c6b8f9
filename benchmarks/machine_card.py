"""Provenance of a benchmark's result: processor, GPUs, versions, commit (the process that writes the result)."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from rollcast.rollout.job import preflight

HERE = Path(__file__).parent


def machine_card(*, gpus: int) -> dict[str, Any]:
    """Return this machine's processor, and its first `gpus` GPUs."""
    return cpu_card() | (gpu_card(preflight.usable_gpus()[:gpus]) if gpus else {})


def cpu_card() -> dict[str, Any]:
    """Return processor and system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}


def gpu_card(uuids: list[str]) -> dict[str, Any]:
    """Return names, memory, driver and NVLink of these GPUs. Creates no CUDA context."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    links = [_nvlinks(pynvml, handle) for handle in handles]
    return {
        "gpus": [_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles],
        "gpu_count": len(handles),
        "gpu_memory_bytes": min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles),
        "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
        "nvlink": all(links),
        "nvlinks_per_gpu": min(links),
    }


def versions() -> dict[str, str | None]:
    """Return the versions that results depend on; None for what is not installed."""
    return preflight.versions() | {
        "python": platform.python_version(),
        "transformers": importlib.metadata.version("transformers"),
        "nccl": ".".join(map(str, nccl.version())) if torch.cuda.device_count() else None,
    }


def torchrun(*arguments: str | Path, ranks: int) -> list[str]:
    """Return the command of a job on this machine; see `job_environ`."""
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*job, *map(str, arguments)]


def job_environ() -> dict[str, str]:
    """Return the environment of processes that import the benchmarks' modules."""
    paths = filter(None, (str(HERE), os.environ.get("PYTHONPATH")))
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def commit() -> str:
    """Return the checked-out commit; with ", changed" if the sources differ from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=HERE, capture_output=True).returncode == 1
    return f"{head or 'unknown'}{', changed' if changed else ''}"


def _nvlinks(pynvml: Any, handle: Any) -> int:
    """Return the number of active NVLink connections of a GPU."""
    active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += pynvml.nvmlDeviceGetNvLinkState(handle, link)
        except pynvml.NVMLError:
            break
    return active


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
