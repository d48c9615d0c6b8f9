"""The schedule of a run: modes of overlap, and the table of decisions, events in and actions out (trainer).

Every rank runs the same table over the same events, so all of them take the same actions in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from rollcast.rollout.config import one_of
from rollcast.rollout.errors import OrchestratorError

STALE = ("complete", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """What may overlap. Use `on_policy()`, `one_step_off()` or `async_(...)` to make one.

    A batch is in hand from the start of its generation until it is trained on or dropped. Its age is the number of
    versions that the policy is ahead of its oldest token.
    """

    name: str
    max_staleness: int
    """No batch of a greater age is ever trained on. A batch is started only if it would not be too old when its turn
    comes: each batch in hand or under training, at most this many, makes one version before that."""
    ahead: int
    """Most batches in hand at a time."""
    sync_in_flight: bool
    """Whether a sync may happen while requests are in flight. Else it waits for them."""
    stale: str
    """What happens to a batch that takes longer than others: see `async_`."""


def on_policy() -> Mode:
    """Return the mode without overlap: generate, train, sync. Every token is sampled by the policy that it trains."""
    return Mode(name="on_policy", max_staleness=0, ahead=1, sync_in_flight=False, stale="complete")


def one_step_off() -> Mode:
    """Return the mode that generates the next batch, under the old weights, while one is trained on.

    A sync begins when both are finished. Every batch but the first is one version old, and entirely of that version.
    """
    return Mode(name="one_step_off", max_staleness=1, ahead=1, sync_in_flight=False, stale="complete")


def async_(*, max_staleness: int, stale: str = "complete") -> Mode:
    """Return the mode that generates during training and syncs; up to `max_staleness + 1` batches are in hand.

    `stale` is the treatment of late batches. "complete": none gets too old. Later batches go first as long as every
    earlier one still gets its turn in time; then training waits for the late one. "drop": training waits for no batch
    while another is ready, and a batch that is older than `max_staleness` versions when its turn comes is dropped.
    That drops the batches that take long to generate: long completions become rare.

    Raises `ValueError` for bad input. With `max_staleness=0` nothing overlaps.
    """
    if max_staleness < 0:
        raise ValueError(f"max_staleness must be at least 0, got {max_staleness}")
    one_of("stale", stale, STALE)
    return Mode(name="async", max_staleness=max_staleness, ahead=max_staleness + 1, sync_in_flight=True, stale=stale)


class Phase(Enum):
    """The phase of training. Generation goes on beside it as far as the mode allows."""

    IDLE = auto()
    """Ready to train on a batch."""
    TRAINING = auto()
    DUE = auto()
    """A batch was trained on, and a sync is due."""
    SYNCING = auto()
    OVER = auto()


@dataclass(frozen=True, slots=True)
class Started:
    """Event: the run begins."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Event: the present state of generation."""

    oldest: Mapping[int, int] = field(default_factory=dict)
    """Batches that every rank has generated, with the version of their oldest token on any rank."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Event: training on the batch has finished."""


@dataclass(frozen=True, slots=True)
class Synced:
    """Event: the engines serve the next version."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Action: start to generate a batch."""

    batch: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Action: drop a batch that is too old."""

    batch: int


@dataclass(frozen=True, slots=True)
class Train:
    """Action: train on a batch. `Trained` follows."""

    batch: int


@dataclass(frozen=True, slots=True)
class Sync:
    """Action: send the weights. `Synced` follows."""

    version: int


Event = Started | Generated | Trained | Synced
Action = Generate | Drop | Train | Sync


@dataclass(kw_only=True)
class State:
    """Everything that decisions depend on."""

    mode: Mode
    steps: int
    version: int
    """Policy version that the engines serve."""
    phase: Phase = Phase.IDLE
    in_hand: dict[int, int] = field(default_factory=dict)
    """Batches in the order in which they were started, with the version that the engines served then."""
    ready: dict[int, int] = field(default_factory=dict)
    """Batches in hand that are generated, with the version of their oldest token."""
    taken: int = 0
    """Batches trained on, including the one under training."""
    dropped: int = 0

    @property
    def batches_in_training(self) -> int:
        """1 from the choice of a batch until the engines serve the version that it makes, else 0."""
        return int(self.phase in (Phase.TRAINING, Phase.DUE, Phase.SYNCING))

    def age(self, batch: int) -> int:
        """Return how many versions the oldest token is behind; until it is known, assume that of the start."""
        return self.version - self.ready.get(batch, self.in_hand[batch])

    def is_stale(self, batch: int) -> bool:
        """Return whether a batch is too old to be trained on."""
        return self.age(batch) > self.mode.max_staleness

    def choice(self) -> int | None:
        """Return the first batch that may be trained on now, or None."""
        for place, batch in enumerate(self.in_hand):
            if batch in self.ready and not self.is_stale(batch):
                return batch
            if self.mode.stale == "complete" and self.age(batch) + place >= self.mode.max_staleness:
                # If a later batch went first, this one would be too old when its turn comes.
                return None
        return None

    def step(self, event: Event) -> list[Action]:
        """Apply an event and return the actions that follow, in order.

        Raises `OrchestratorError` for a batch with tokens of older weights than the engines should serve.
        """
        _record(self, event)
        row = next(row for row in TABLE if (row.phase, row.event) == (self.phase, type(event)) and row.when(self))
        self.phase = row.next
        return [action for rule in row.then for action in rule(self)]

    @property
    def waits(self) -> bool:
        """Whether nothing can happen before more is generated."""
        return not (_may_train(self) if self.phase is Phase.IDLE else _may_sync(self))


def _record(state: State, event: Event) -> None:
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
    """Start as many batches as will not be too old when their turn comes, and as the run still needs."""
    actions: list[Action] = []
    room = min(state.mode.ahead, state.mode.max_staleness + 1 - state.batches_in_training, state.steps - state.taken)
    while len(state.in_hand) < room:
        batch = state.taken + state.dropped + len(state.in_hand)
        state.in_hand[batch] = state.version
        actions.append(Generate(batch))
    return actions


def _drop(state: State) -> Sequence[Action]:
    """Drop every batch that is generated and too old."""
    stale = [batch for batch in state.ready if state.is_stale(batch)]
    assert not stale or state.mode.stale == "drop", f"{stale} came too late in {state}"
    for batch in stale:
        del state.in_hand[batch], state.ready[batch]
    state.dropped += len(stale)
    return [Drop(batch) for batch in stale]


def _train(state: State) -> Sequence[Action]:
    """Train on the chosen batch; start the next ones before, because training blocks the caller."""
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
    """In `phase`, on `event`, if `when` holds: go to `next` and take the actions of `then` in order."""

    phase: Phase
    event: type[Event]
    when: Callable[[State], bool]
    next: Phase
    then: tuple[Rule, ...] = ()


# The first row that matches counts. An event that has no row in a phase cannot happen there.
TABLE = (
    Row(Phase.IDLE, Started, _always, Phase.IDLE, (_generate,)),
    Row(Phase.IDLE, Generated, _may_train, Phase.TRAINING, (_drop, _train)),
    Row(Phase.IDLE, Generated, _always, Phase.IDLE, (_drop, _generate)),
    Row(Phase.TRAINING, Trained, _always, Phase.DUE),
    Row(Phase.DUE, Generated, _may_sync, Phase.SYNCING, (_sync,)),
    Row(Phase.DUE, Generated, _always, Phase.DUE),
    Row(Phase.SYNCING, Synced, _is_done, Phase.OVER),
    Row(Phase.SYNCING, Synced, _always, Phase.IDLE, (_drop, _generate)),
)
