"""What makes two runs alike, and is not the engines' business: seeds of requests, names of batches (trainer)."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from rollcast.rollout.protocol.sampling import Sampling


class Repeatable:
    """For `RolloutConfig(deterministic=True)`. Draws the same seeds for the same requests in the same order."""

    def __init__(self, seed: int, *, rank: int) -> None:
        self._random = random.Random(f"{seed}/{rank}")
        self._names = (f"{rank}/{number}" for number in itertools.count())

    def seeded(self, sampling: Sampling) -> Sampling:
        """With a seed of its own, unless it has one."""
        if sampling.seed is not None:
            return sampling
        return msgspec.structs.replace(sampling, seed=self._random.getrandbits(31))

    @contextlib.contextmanager
    def batch(self, run: Callable[[int, str], object]) -> "Iterator[Batch]":
        """Requests that are sent meanwhile are a batch; `run(engine, name)` is called when all are sent."""
        batch = Batch(next(self._names))
        try:
            yield batch
        finally:
            # After a failure, too: those that were sent wait for it, even to be aborted.
            for engine in sorted(batch.engines):
                run(engine, batch.name)


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that an engine runs together."""

    name: str
    engines: set[int] = field(default_factory=set)

    def joined_by(self, engine: int) -> str:
        """The name, for a request that goes there."""
        self.engines.add(engine)
        return self.name
