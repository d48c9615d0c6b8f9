"""The orchestrator's decisions as a table: events in, actions out, nothing else (trainer).

Every rank runs the same table over the same events, so all of them do the same in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from rollcast.rollout.errors import OrchestratorError
from rollcast.rollout.orchestrator.modes import Mode


class Phase(Enum):
    """What training is at. Generation goes on beside it as far as the mode allows."""

    IDLE = auto()
    """A batch is wanted."""
    TRAINING = auto()
    DUE = auto()
    """A batch was trained on; the engines do not have the weights yet."""
    SYNCING = auto()
    OVER = auto()


@dataclass(frozen=True, slots=True)
class Begun:
    """Event: the run begins."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Event: what is known of generation now."""

    oldest: Mapping[int, int] = field(default_factory=dict)
    """Batches that every rank has generated: the version of their oldest token over all ranks."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Event: the batch under training was trained on."""


@dataclass(frozen=True, slots=True)
class Synced:
    """Event: the engines serve the next version."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Action: begin to generate a batch."""

    batch: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Action: forget a batch, which is too old."""

    batch: int


@dataclass(frozen=True, slots=True)
class Train:
    """Action: train on a batch. `Trained` follows."""

    batch: int


@dataclass(frozen=True, slots=True)
class Sync:
    """Action: send the weights. `Synced` follows."""

    version: int


Event = Begun | Generated | Trained | Synced
Action = Generate | Drop | Train | Sync


@dataclass(kw_only=True)
class State:
    """All that decisions are made of."""

    mode: Mode
    steps: int
    version: int
    """What the engines serve."""
    phase: Phase = Phase.IDLE
    in_hand: dict[int, int] = field(default_factory=dict)
    """Batches in the order in which they began, with the version that the engines had then."""
    ready: dict[int, int] = field(default_factory=dict)
    """Those that are generated, with the version of their oldest token."""
    taken: int = 0
    """Batches trained on, the one under training included."""
    dropped: int = 0

    @property
    def under_way(self) -> int:
        """1 from the choice of a batch until the engines have what it taught."""
        return int(self.phase in (Phase.TRAINING, Phase.DUE, Phase.SYNCING))

    def age(self, batch: int) -> int:
        """Versions that the oldest token is behind; as if it was made at once while it is not known."""
        return self.version - self.ready.get(batch, self.in_hand[batch])

    def is_stale(self, batch: int) -> bool:
        return self.age(batch) > self.mode.max_staleness

    def choice(self) -> int | None:
        """The first batch that may be trained on now."""
        for place, batch in enumerate(self.in_hand):
            if batch in self.ready and not self.is_stale(batch):
                return batch
            if self.mode.stale == "complete" and self.age(batch) + place >= self.mode.max_staleness:
                # Once a later one goes first, this one is too old when its turn comes.
                return None
        return None

    def step(self, event: Event) -> list[Action]:
        """Take an event in: what to do now, in this order. Raises `OrchestratorError` if a batch cannot be."""
        _note(self, event)
        row = next(row for row in TABLE if (row.phase, row.event) == (self.phase, type(event)) and row.when(self))
        self.phase = row.next
        return [action for rule in row.then for action in rule(self)]

    @property
    def waits(self) -> bool:
        """Whether only news of generation leads on."""
        return not (_may_train(self) if self.phase is Phase.IDLE else _may_sync(self))


def _note(state: State, event: Event) -> None:
    if isinstance(event, Synced):
        state.version += 1
    for batch, oldest in event.oldest.items() if isinstance(event, Generated) else ():
        if oldest < state.in_hand[batch]:
            raise OrchestratorError(
                f"batch {batch} has tokens of version {oldest}, but began when the engines served version "
                f"{state.in_hand[batch]}: they do not serve what was synced"
            )
        state.ready[batch] = oldest


def _always(state: State) -> bool:
    return True


def _may_train(state: State) -> bool:
    return state.choice() is not None


def _may_sync(state: State) -> bool:
    return state.mode.sync_in_flight or state.in_hand.keys() == state.ready.keys()


def _is_done(state: State) -> bool:
    return state.taken == state.steps


def _generate(state: State) -> Sequence[Action]:
    """Begin as many batches as will not be too old when their turn comes, and as the run still needs."""
    begun: list[Action] = []
    room = min(state.mode.ahead, state.mode.max_staleness + 1 - state.under_way, state.steps - state.taken)
    while len(state.in_hand) < room:
        batch = state.taken + state.dropped + len(state.in_hand)
        state.in_hand[batch] = state.version
        begun.append(Generate(batch))
    return begun


def _drop(state: State) -> Sequence[Action]:
    stale = [batch for batch in state.ready if state.is_stale(batch)]
    assert not stale or state.mode.stale == "drop", f"{stale} came too late in {state}"
    for batch in stale:
        del state.in_hand[batch], state.ready[batch]
    state.dropped += len(stale)
    return [Drop(batch) for batch in stale]


def _train(state: State) -> Sequence[Action]:
    """Generation of what comes next begins before training, which keeps the caller busy."""
    batch = state.choice()
    assert batch is not None
    del state.in_hand[batch], state.ready[batch]
    state.taken += 1
    return [*_generate(state), Train(batch)]


def _sync(state: State) -> Sequence[Action]:
    return [Sync(state.version + 1)]


Rule = Callable[[State], Sequence[Action]]


@dataclass(frozen=True, slots=True)
class Row:
    """In `phase`, when `event` comes and `when` holds: go to `next`, and do `then` in order."""

    phase: Phase
    event: type[Event]
    when: Callable[[State], bool]
    next: Phase
    then: tuple[Rule, ...] = ()


# The first row that fits. An event that has no row in a phase cannot happen there.
TABLE = (
    Row(Phase.IDLE, Begun, _always, Phase.IDLE, (_generate,)),
    Row(Phase.IDLE, Generated, _may_train, Phase.TRAINING, (_drop, _train)),
    Row(Phase.IDLE, Generated, _always, Phase.IDLE, (_drop, _generate)),
    Row(Phase.TRAINING, Trained, _always, Phase.DUE),
    Row(Phase.DUE, Generated, _may_sync, Phase.SYNCING, (_sync,)),
    Row(Phase.DUE, Generated, _always, Phase.DUE),
    Row(Phase.SYNCING, Synced, _is_done, Phase.OVER),
    Row(Phase.SYNCING, Synced, _always, Phase.IDLE, (_drop, _generate)),
)
