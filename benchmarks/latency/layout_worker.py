"""The workers' side of the benchmark's layouts (every vLLM worker process, as `worker_extension_cls`)."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from latency.models import manifest_of
from latency.seeded import SeededParams
from latency.worker import BenchWorker
from rollcast.comm import Deadline, Group, join_group
from rollcast.comm.transport.rendezvous import connect_store


@register_model_loader("seeded")
class SeededLoader(BaseModelLoader):
    """Loads random weights through vLLM's own load: an engine that starts so has what every sync must lead to."""

    def download_model(self, model_config: Any) -> None:
        """Do nothing: the weights are made here."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Load every parameter of the checkpoint, one at a time."""
        loader: Any = model
        loaded: set[str] = loader.load_weights(seeded_weights(model_config.model, next(model.parameters()).device))
        loader.bench_loaded = sorted(loaded)
        if torch.cuda.is_available():
            # The whole parameters' memory is no part of the model's.
            torch.cuda.empty_cache()


def seeded_weights(folder: str, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter by its checkpoint name, in the model's dtype."""
    seeded = SeededParams(device)
    for spec in manifest_of(folder).specs:
        yield spec.name, seeded.make(spec).to(spec.dtype)


class LayoutWorker(BenchWorker):
    """Adds raw broadcasts from several senders, each over a group of its own."""

    bench_store: Any = None
    bench_groups: list[Group]
    bench_number: int

    def bench_loaded(self) -> list[str]:
        """Return the names of the tensors that vLLM's loader filled, among those that are live."""
        model: Any = self.rollcast_sync.model.module
        return list(model.bench_loaded)

    def bench_join_senders(
        self, transport: str, address: str, senders: int, first: int, workers: int, timeout_s: float
    ) -> None:
        """Join the groups: rank 0 of each is a sender. Collective. `first` is the number of the engine's worker 0."""
        deadline = Deadline(timeout_s)
        self.bench_store = connect_store(address, deadline)
        self.bench_number = first + self.rollcast_sync.rank
        where: dict[str, Any] = {"device": self.rollcast_sync.device, "rank": 1 + self.bench_number}
        self.bench_groups = [
            join_group(transport, self.bench_store, size=1 + workers, deadline=deadline, name=f"raw-{sender}", **where)
            for sender in range(senders)
        ]

    def bench_receive_from_all(self, pieces: list[list[int]], update: int, timeout_s: float) -> float:
        """Receive pieces of these sizes from each sender; return the time when all have arrived. Collective.

        That this worker is about to receive is written to the groups' store.
        """
        deadline = Deadline(timeout_s)
        device = self.rollcast_sync.device
        buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for sizes in pieces]
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.bench_store.set(f"ready/{update}/{self.bench_number}", "1")
        works: list[Any] = []
        # In turn: the senders send at the same time.
        for turn in range(max(map(len, pieces))):
            for group, sizes, buffer in zip(self.bench_groups, pieces, buffers, strict=True):
                if turn < len(sizes):
                    works.append(group.broadcast([buffer[: sizes[turn]]], root=0, deadline=deadline))
        for work in works:
            work.wait(deadline)
        return time.perf_counter()

    def bench_leave_senders(self) -> None:
        """Leave the groups and free what they used."""
        for group in self.bench_groups:
            group.close()
        self.bench_groups, self.bench_store = [], None
        self.bench_reset_peak()
