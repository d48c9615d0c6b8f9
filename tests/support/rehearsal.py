"""Orchestrators of several trainer ranks, each a thread; engines and training are stand-ins."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from rollcast.comm.agreement import Agreement
from rollcast.rollout import Mode, Orchestrator, Outcome

LONG_S = 30.0


@dataclass(frozen=True)
class GeneratedPart:
    """A rank's part of a generated batch."""

    batch: int
    oldest_version: int


class Rehearsal:
    """The ranks of a job. `train` and `sync` end when every rank is in them, unless they are not `collective`.

    A hook is called with the rank and the batch or version, before the stand-in does anything.
    """

    def __init__(self, ranks: int, *, longest_s: float = 0.0, seed: int = 0, collective: bool = True) -> None:
        self.ranks = ranks
        self.longest_s = longest_s
        self.hooks: dict[str, Callable[[int, int], None]] = {}
        self.logs: list[list[str]] = [[] for _ in range(ranks)]
        self.ages: list[dict[int, int]] = [{} for _ in range(ranks)]
        self.generated: list[list[int]] = [[] for _ in range(ranks)]
        self.waits = [0] * ranks
        """How often each rank has waited for a batch."""
        self.cancelled = threading.Event()
        self.version = 0
        self._random = random.Random(seed)
        self._together = threading.Barrier(ranks if collective else 1)
        self._store = dist.HashStore()

    def orchestrator(self, rank: int, mode: Mode, *, timeout_s: float = LONG_S) -> Orchestrator[GeneratedPart]:
        return Orchestrator(
            mode,
            generate=lambda batch: self.generate(rank, batch),
            train=lambda part: self._train(rank, part),
            sync=lambda version: self._sync(rank, version),
            dropped=lambda part: self.logs[rank].append(f"drop {part.batch}"),
            waiting=lambda: self._wait(rank),
            cancel=self.cancelled.set,
            agreement=Agreement(self._store, rank=rank, size=self.ranks),
            rank=rank,
            name="rehearsal",
            version=lambda: self.version,
            timeout_s=timeout_s,
        )

    def start(self, *modes: Mode, steps: int, **options: Any) -> list[Future[Outcome]]:
        """Start all ranks at the same time, each in its own mode if there are several."""
        runs = [self.orchestrator(rank, modes[rank % len(modes)], **options).run for rank in range(self.ranks)]
        threads = ThreadPoolExecutor(self.ranks)
        started = [threads.submit(run, steps=steps) for run in runs]
        threads.shutdown(wait=False)
        return started

    def run(self, mode: Mode, *, steps: int) -> list[Outcome]:
        return [future.result(LONG_S) for future in self.start(mode, steps=steps)]

    def generate(self, rank: int, batch: int) -> GeneratedPart:
        oldest = self.version
        self._hook("generate", rank, batch)
        # Sometimes much longer than training.
        time.sleep(self.longest_s * self._random.random() ** 4)
        self.generated[rank].append(batch)
        return GeneratedPart(batch, oldest)

    def _train(self, rank: int, part: GeneratedPart) -> None:
        self.logs[rank].append(f"train {part.batch}")
        self.ages[rank][part.batch] = self.version - part.oldest_version
        self._hook("train", rank, part.batch)
        time.sleep(self.longest_s * 0.1 * self._random.random())
        self._together.wait(LONG_S)

    def _sync(self, rank: int, version: int) -> None:
        self.logs[rank].append(f"sync {version}")
        self._hook("sync", rank, version)
        if self._together.wait(LONG_S) == 0:
            self.version = version
        self._together.wait(LONG_S)

    def _wait(self, rank: int) -> nullcontext[None]:
        self.waits[rank] += 1
        return nullcontext()

    def _hook(self, name: str, rank: int, number: int) -> None:
        if name in self.hooks:
            self.hooks[name](rank, number)


def generating() -> list[str]:
    """Return the names of the threads that generate at the moment."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollcast-generate")]
