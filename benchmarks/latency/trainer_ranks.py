"""Steps that all trainer ranks take together (every trainer rank of the latency benchmark)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(seconds=150)


@dataclass(frozen=True)
class _Outcome:
    result: Any = None
    error: str | None = None


class TrainerRanks:
    """The trainer ranks; makes torch's default process group, which DTensor meshes use."""

    def __init__(self, *, rank: int, size: int, device: str) -> None:
        self.rank = rank
        self.size = size
        # One machine: whatever its name resolves to, gloo finds the other ranks.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
        self._control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def together(self, step: Callable[[], T]) -> list[T]:
        """Take a step once all ranks are here; return every rank's result, by rank. Collective.

        Raises the same `RuntimeError` on all ranks if the step failed on one: none is left waiting.
        """
        dist.barrier(group=self._control)
        try:
            outcome = _Outcome(step())
        except Exception as error:
            outcome = _Outcome(error=str(error) or type(error).__name__)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self._control)
        failed = {rank: each.error for rank, each in enumerate(outcomes) if each.error is not None}
        if failed:
            texts = dict.fromkeys(failed.values())
            raise RuntimeError(
                "; ".join(texts) if self.size == 1 else f"trainer rank {min(failed)}: {'; '.join(texts)}"
            )
        return [each.result for each in outcomes]

    def close(self) -> None:
        """Destroy the process groups."""
        dist.destroy_process_group()
