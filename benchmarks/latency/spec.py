"""What the command tells one torchrun job of the latency benchmark, and what the job writes (both)."""

from pathlib import Path
from typing import Any

import msgspec

from rollcast.rollout import RolloutConfig

METHODS = (
    "rollcast",
    "rollcast-shadow",
    "raw-broadcast",
    "raw-broadcast-with-call",
    "rpc-per-tensor",
    "vllm-native-packed",
    "vllm-native-per-tensor",
    "checkpoint-engine",
    "rollcast-nccl",
)
DECODING = ("rollcast", "rollcast-shadow", "rollcast-nccl")
"""Methods that are also measured while the engine decodes: those that keep requests whole."""


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model's job."""

    model: str
    folder: str
    """The model's config folder."""
    device: str
    methods: tuple[str, ...]
    repeats: int
    decode: int
    """Sequences that decode during a sync; 0: not measured."""
    eager: bool
    max_seconds: float
    """Time that the repeats of one method may take."""
    gpu_memory_utilization: float
    ceilings: bool
    results: str
    """File that the job appends `Line`s to."""

    def rollout_config(self) -> RolloutConfig:
        """The engine's settings; the same on both ranks."""
        native = any(method.startswith("vllm-native") for method in self.methods) and self.device == "cuda"
        return RolloutConfig(
            model=self.folder,
            device=self.device,
            load_format="dummy",
            enforce_eager=self.eager,
            gpu_memory_utilization=self.gpu_memory_utilization,
            # A tiny model makes a thousand tokens in a second: what decodes must outlast the updates.
            max_model_len=2048 if self.device == "cuda" else 16384,
            max_num_seqs=max(self.decode, 16),
            engine_args={"weight_transfer_config": {"backend": "nccl"}} if native else {},
            worker_extension_cls="latency.worker.BenchWorker",
            cpu_weights="plain",
            sync_timeout_s=120.0,
        )


class Line(msgspec.Struct, frozen=True):
    """One thing that the job found out."""

    kind: str
    """"row", "ceilings", "engine" or "error"."""
    content: Any


def append(path: str | Path, line: Line) -> None:
    """Add a line; it stays whatever becomes of the job."""
    with Path(path).open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def read(path: str | Path) -> list[Line]:
    """Every line so far."""
    return [msgspec.json.decode(line, type=Line) for line in Path(path).read_bytes().splitlines()]
