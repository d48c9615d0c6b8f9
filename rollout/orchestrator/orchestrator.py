"""The orchestrator: runs generate, train and sync in one of three modes, in step on all trainer ranks (trainer)."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from rollcast.comm import Deadline
from rollcast.comm.agreement import Agreement, Verdict, unanimous
from rollcast.rollout.errors import OrchestratorError
from rollcast.rollout.orchestrator.generation import BackgroundGeneration, Batch
from rollcast.rollout.orchestrator.schedule import (
    Action,
    Drop,
    Event,
    Generate,
    Generated,
    Mode,
    Phase,
    Started,
    State,
    Sync,
    Synced,
    Train,
    Trained,
)

# How often a rank that waits for its own generation compares its progress with the other ranks.
POLL_S = 0.05

T = TypeVar("T")


class Progress(msgspec.Struct, frozen=True):
    """The progress of generation, on one rank or on all of them together."""

    oldest: dict[int, int] = {}
    """Batches that are generated, with the version of their oldest token."""
    error: str = ""
    """What a rank raised; empty if none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a run. Every batch that was started was trained on or dropped."""

    trained: int
    """Batches trained on."""
    dropped: int
    """Batches dropped."""
    version: int
    """Policy version that the engines serve."""


class Orchestrator(Generic[Batch]):
    """Generates, trains and syncs, overlapping as far as the mode allows.

        orchestrator = job.orchestrator(
            rollcast.async_(max_staleness=2),
            generate=generate,      # batch number -> this rank's part of the batch, with an `oldest_version`
            train=train,            # gets that part, on every rank at the same time
            sync=lambda version: broadcaster.sync(version=version),
        )
        orchestrator.run(steps=1000)

    `generate` is called in a thread of its own, for several batches at a time in async mode, and must not be
    collective. `train`, `sync` and `dropped` are called by the thread that calls `run`, in the same order on every
    rank, so they may be. Each decision depends only on progress that all ranks have exchanged: a batch counts as
    generated when every rank has it, and is as old as its oldest token on any of them.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        generate: Callable[[int], Batch],
        train: Callable[[Batch], None],
        sync: Callable[[int], object],
        dropped: Callable[[Batch], None],
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
        cancel: Callable[[], None],
        agreement: Agreement,
        rank: int,
        name: str,
        version: Callable[[], int],
        timeout_s: float,
    ) -> None:
        self._mode = mode
        self._generate = generate
        self._train = train
        self._sync = sync
        self._dropped = dropped
        self._waiting = waiting
        self._cancel = cancel
        self._agreement = agreement
        self._rank = rank
        self._topics = (f"{name}/{count}" for count in itertools.count())
        self._version = version
        self._timeout_s = timeout_s

    def run(self, *, steps: int) -> Outcome:
        """Train on `steps` batches, each followed by a sync. Collective over the trainer ranks.

        What a rank's `generate`, `train`, `sync` or `dropped` raises is raised on that rank, and as
        `OrchestratorError` on the others when they next exchange progress. Requests in flight end then, and no thread
        is left. Raises `ValueError` for bad input and `OrchestratorError` when a rank does not come in time.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        state = State(mode=self._mode, steps=steps, version=self._version())
        with BackgroundGeneration(self._generate, self._cancel) as generation:
            try:
                self._agree_to_start(state)
                self._drive(state, generation)
            except OrchestratorError:
                raise
            except Exception as error:
                # The other ranks may be about to exchange progress; the store may be what has failed.
                with contextlib.suppress(RuntimeError):
                    self._agreement.leave(next(self._topics), Progress(error=self._describe(error)))
                raise
        return Outcome(trained=state.taken, dropped=state.dropped, version=state.version)

    def _agree_to_start(self, state: State) -> None:
        verdict = self._decide(f"{state.mode} for {state.steps} steps from version {state.version}", unanimous)
        if verdict.late_rank is not None:
            raise OrchestratorError(f"the run did not start: {verdict.error} (trainer_timeout_s)")
        if verdict.error:
            raise ValueError(verdict.error)

    def _drive(self, state: State, generation: BackgroundGeneration[Batch]) -> None:
        event: Event | None = Started()
        while state.phase is not Phase.OVER:
            event = event or self._exchange_progress(state, generation)
            event = self._perform(state.step(event), generation)

    def _exchange_progress(self, state: State, generation: BackgroundGeneration[Batch]) -> Generated:
        """Return the batches that every rank has generated. Collective; raises if any rank has failed."""
        with self._waiting() if state.waits else nullcontext():
            if state.waits:
                generation.wait(POLL_S)
            # Read once: what fails from here on is part of the next exchange, for the other ranks go on till then.
            error = generation.error
            verdict = self._decide(Progress(generation.oldest(), self._describe(error)), _merge)
        if error:
            raise error
        if verdict.value is None:
            raise OrchestratorError(f"the trainer ranks lost each other: {verdict.error} (trainer_timeout_s)")
        if verdict.value.error:
            raise OrchestratorError(verdict.value.error)
        return Generated(verdict.value.oldest)

    def _perform(self, actions: Iterable[Action], generation: BackgroundGeneration[Batch]) -> Event | None:
        """Carry out actions; return the event that follows from the last of them, if one does."""
        event: Event | None = None
        for action in actions:
            match action:
                case Generate(batch):
                    generation.start(batch)
                case Drop(batch):
                    self._dropped(generation.take(batch))
                case Train(batch):
                    self._train(generation.take(batch))
                    event = Trained()
                case Sync(version):
                    self._sync(version)
                    event = Synced()
        return event

    def _describe(self, error: BaseException | None) -> str:
        return f"trainer rank {self._rank}: {type(error).__name__}: {error}" if error else ""

    def _decide(self, value: T, combine: Callable[[Sequence[T]], T]) -> Verdict[T]:
        return self._agreement.decide(next(self._topics), value, combine, deadline=Deadline(self._timeout_s))


def _merge(ranks: Sequence[Progress]) -> Progress:
    """Return the batches that all ranks have, each with the oldest version of any rank, and all errors."""
    errors = [progress.error for progress in ranks if progress.error]
    common = set.intersection(*(set(progress.oldest) for progress in ranks))
    oldest = {batch: min(progress.oldest[batch] for progress in ranks) for batch in sorted(common)}
    return Progress(oldest, "\n".join(errors))
