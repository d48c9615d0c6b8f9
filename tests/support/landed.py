"""What a sync must leave on every rank: in the workers' memory, and as a report."""

from typing import Any

from engines import Engines
from ranks import Weights
from sides import check_same_bytes

from rollcast.comm import SyncReport


def check_landed(engines: Engines, weights: Weights) -> None:
    for workers in engines.workers:
        for worker in workers:
            parts = {name: whole.chunk(engines.size)[worker.index] for name, whole in weights.items()}
            check_same_bytes(worker.memory.tensors, parts)


def check_ok(results: list[Any]) -> None:
    for report in results:
        assert isinstance(report, SyncReport), report
