"""Input of one torchrun job of the benchmark's layouts: those of one placement (the command and the job)."""

import msgspec

from latency.layouts import Layout
from rollcast.rollout import RolloutConfig


class LayoutSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model, and layouts that differ in what the trainers hold only."""

    model: str
    folder: str
    """The model's config folder."""
    device: str
    layouts: list[Layout]
    methods: list[str]
    """Names in `layout_job.METHODS`."""
    repeats: int
    max_seconds: float
    """Seconds that the repeats of one method may take."""
    eager: bool
    gpu_memory_utilization: float
    results: str
    """File that the job appends `Line`s to."""

    def rollout_config(self) -> RolloutConfig:
        """Return the settings of the job; the same on all ranks."""
        layout = self.layouts[0]
        return RolloutConfig(
            model=self.folder,
            trainers=layout.trainers,
            tensor_parallel_size=layout.tensor_parallel_size,
            colocate=layout.colocated,
            device=self.device,
            load_format="seeded",
            enforce_eager=self.eager,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=2048,
            max_num_seqs=16,
            engine_args={"max_num_batched_tokens": 2048, "enable_expert_parallel": layout.expert_parallel},
            worker_extension_cls="latency.layout_worker.LayoutWorker",
            cpu_weights="plain",
            sync_timeout_s=120.0,
        )
