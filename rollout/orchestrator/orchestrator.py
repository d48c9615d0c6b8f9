"""Drives generate, train and sync in one of three modes, on all trainer ranks alike (trainer)."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic

import msgspec

from rollcast.comm import Deadline
from rollcast.comm.agreement import Agreement, unanimous
from rollcast.rollout.errors import OrchestratorError
from rollcast.rollout.orchestrator.generation import Background, Batch
from rollcast.rollout.orchestrator.schedule import (
    Action,
    Begun,
    Drop,
    Event,
    Generate,
    Generated,
    Mode,
    Phase,
    State,
    Sync,
    Synced,
    Train,
    Trained,
)

# A rank that waits for its own generation looks this often at what the others have.
POLL_S = 0.05


class Word(msgspec.Struct, frozen=True):
    """What a rank knows of generation, and what rank 0 makes of all of them."""

    oldest: dict[int, int] = {}
    """Batches that are there, and the version of their oldest token."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the batches of a run: every one that was begun was trained on or dropped."""

    trained: int
    dropped: int
    version: int
    """What the engines serve."""


class Orchestrator(Generic[Batch]):
    """Generates, trains and syncs, as far at the same time as the mode allows.

        orchestrator = job.orchestrator(
            rollcast.async_(max_staleness=2),
            generate=generate,      # batch number -> what this rank made of it, with an `oldest_version`
            train=train,            # is handed that on every rank at the same time
            sync=lambda version: broadcaster.sync(version=version),
        )
        orchestrator.run(steps=1000)

    `generate` is called in a thread of its own, for several batches at a time in async mode, and must not be
    collective. `train`, `sync` and `dropped` are called by the thread that calls `run`, in the same order on every
    rank, so they may be. What is done next hangs on what all ranks have told each other and on nothing else: a
    batch counts as generated when every rank has it, and is as old as its oldest token on any of them.
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
        `OrchestratorError` on the others when they next look for a batch. Requests under way end then, and no thread
        is left. Raises `ValueError` for bad input and `OrchestratorError` when a rank does not come in time.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        state = State(mode=self._mode, steps=steps, version=self._version())
        with Background(self._generate, self._cancel) as background:
            try:
                self._begin(state)
                self._drive(state, background)
            except OrchestratorError:
                raise
            except Exception as error:
                # The others may be on their way to the next round; the store may be what has failed.
                with contextlib.suppress(RuntimeError):
                    self._agreement.leave(next(self._topics), _encode(Word(error=self._words(error))))
                raise
        return Outcome(trained=state.taken, dropped=state.dropped, version=state.version)

    def _begin(self, state: State) -> None:
        verdict = self._decide(f"{state.mode} for {state.steps} steps from version {state.version}", unanimous)
        if "did not come" in verdict:
            raise OrchestratorError(f"the run did not start: {verdict} (trainer_timeout_s)")
        if verdict:
            raise ValueError(verdict)

    def _drive(self, state: State, background: Background[Batch]) -> None:
        event: Event | None = Begun()
        while state.phase is not Phase.OVER:
            event = event or self._hear(state, background)
            event = self._perform(state.step(event), background)

    def _hear(self, state: State, background: Background[Batch]) -> Generated:
        """A round of all ranks: what everybody has generated. The first error of any rank ends it."""
        with self._waiting() if state.waits else nullcontext():
            if state.waits:
                background.wait(POLL_S)
            # Looked at once: what fails from here on is told in the next round, for the others go on till then.
            error = background.error
            verdict = self._decide(_encode(Word(background.oldest(), self._words(error))), _merged)
        if error:
            raise error
        try:
            heard = msgspec.json.decode(verdict, type=Word)
        except msgspec.DecodeError:
            raise OrchestratorError(f"the trainer ranks lost each other: {verdict} (trainer_timeout_s)") from None
        if heard.error:
            raise OrchestratorError(heard.error)
        return Generated(heard.oldest)

    def _perform(self, actions: Iterable[Action], background: Background[Batch]) -> Event | None:
        """Carry out what was decided; what came of it, if it leads on."""
        event: Event | None = None
        for action in actions:
            match action:
                case Generate(batch):
                    background.start(batch)
                case Drop(batch):
                    self._dropped(background.take(batch))
                case Train(batch):
                    self._train(background.take(batch))
                    event = Trained()
                case Sync(version):
                    self._sync(version)
                    event = Synced()
        return event

    def _words(self, error: BaseException | None) -> str:
        return f"trainer rank {self._rank}: {type(error).__name__}: {error}" if error else ""

    def _decide(self, word: str, judge: Callable[[Sequence[str]], str]) -> str:
        try:
            return self._agreement.decide(next(self._topics), word, judge, deadline=Deadline(self._timeout_s))
        except TimeoutError as late:
            return str(late)


def _encode(word: Word) -> str:
    return msgspec.json.encode(word).decode()


def _merged(words: Sequence[str]) -> str:
    """A judge: the batches that all ranks have, as old as the oldest; every error."""
    heard = [msgspec.json.decode(word, type=Word) for word in words]
    errors = [word.error for word in heard if word.error]
    common = set.intersection(*(set(word.oldest) for word in heard))
    oldest = {batch: min(word.oldest[batch] for word in heard) for batch in sorted(common)}
    return _encode(Word(oldest, "\n".join(errors)))
