"""Data parallelism of the trainer ranks: wrap the model, reduce numbers (trainer ranks)."""

import os
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Trainers:
    """The trainer ranks of the job. A single one uses no torch.distributed.

    Create it inside `rollcast.rollout.join`, where torch.distributed sees the trainer ranks only.
    """

    def __init__(self, *, rank: int, size: int, device: str) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def share(self, model: nn.Module, parallel: str) -> nn.Module:
        """Shard (fsdp2) or replicate (ddp) the model over the trainers. Collective."""
        if self.size == 1:
            return model
        if parallel == "ddp":
            return DistributedDataParallel(model)
        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def mean(self, value: float) -> float:
        """Return the mean over the trainers. Collective."""
        return self.sum([value])[0] / self.size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over the trainers. Collective."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Return the largest value over the trainers. Collective."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def close(self) -> None:
        """Leave the process group. Collective."""
        if self.size > 1:
            dist.destroy_process_group()

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return [*values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()
