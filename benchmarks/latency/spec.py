"""Input and output of one torchrun job of the latency benchmark (the command and the job)."""

from pathlib import Path
from typing import Any

import msgspec

from rollcast.rollout import RolloutConfig


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model's job."""

    model: str
    folder: str
    """The model's config folder."""
    device: str
    methods: tuple[str, ...]
    """Names in `methods.METHODS`."""
    weight_transfer: bool
    """Configure vLLM's own weight transfer in the engine."""
    repeats: int
    decode: int
    """Sequences that decode during a sync; 0: not measured."""
    eager: bool
    max_seconds: float
    """Seconds that the repeats of one method may take."""
    gpu_memory_utilization: float
    ceilings: bool
    results: str
    """File that the job appends `Line`s to."""

    def rollout_config(self) -> RolloutConfig:
        """Return the engine's settings; the same on both ranks."""
        return RolloutConfig(
            model=self.folder,
            device=self.device,
            load_format="dummy",
            enforce_eager=self.eager,
            gpu_memory_utilization=self.gpu_memory_utilization,
            # A tiny model decodes a thousand tokens in a second: sequences must outlast the updates.
            max_model_len=2048 if self.device == "cuda" else 16384,
            max_num_seqs=max(self.decode, 16),
            engine_args={"weight_transfer_config": {"backend": "nccl"}} if self.weight_transfer else {},
            worker_extension_cls="latency.worker.BenchWorker",
            cpu_weights="plain",
            sync_timeout_s=120.0,
        )


class Line(msgspec.Struct, frozen=True):
    """One result of the job."""

    kind: str
    """"row", "ceilings", "engine" or "error"."""
    content: Any


def append(path: str | Path, line: Line) -> None:
    """Append a line to the file, so that it outlives a job that fails later."""
    with Path(path).open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def read(path: str | Path) -> list[Line]:
    """Return every line so far."""
    return [msgspec.json.decode(line, type=Line) for line in Path(path).read_bytes().splitlines()]
