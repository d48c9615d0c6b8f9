"""A job on a simulated clock: how long everything takes is given, and what happens is written down."""

from collections.abc import Callable
from dataclasses import dataclass, field

from rollcast.rollout import Mode
from rollcast.rollout.orchestrator.schedule import (
    Drop,
    Event,
    Generate,
    Generated,
    Phase,
    Started,
    State,
    Sync,
    Synced,
    Train,
    Trained,
)


@dataclass
class Timeline:
    """Runs the table with a clock in place of engines and trainers."""

    mode: Mode
    steps: int
    generate_s: Callable[[int], float]
    train_s: Callable[[int], float] = lambda batch: 1.0
    late: Callable[[int, int], int] = lambda batch, room: 0
    """How many of the `room` versions that came while a batch was generated had come before its first token."""
    clock_s: float = 0.0
    log: list[str] = field(default_factory=list)
    ages: dict[int, int] = field(default_factory=dict)
    """Of every batch that was trained on: versions behind when it was."""
    dropped_ages: dict[int, int] = field(default_factory=dict)
    most_in_hand: int = 0
    idle: list[tuple[float, float]] = field(default_factory=list)
    """When training waited for a batch: from, to."""
    ends: dict[int, float] = field(default_factory=dict)
    """When each batch was there."""

    def __post_init__(self) -> None:
        self.state = State(mode=self.mode, steps=self.steps, version=0)
        self.begun: dict[int, int] = {}
        self.oldest: dict[int, int] = {}

    def run(self) -> "Timeline":
        event: Event = Started()
        while self.state.phase is not Phase.OVER:
            event = self._perform(event) or self._news()
        return self

    def _perform(self, event: Event) -> Event | None:
        came = None
        for action in self.state.step(event):
            match action:
                case Generate(batch):
                    self._write("generate", batch)
                    self.begun[batch] = self.state.version
                    self.ends[batch] = self.clock_s + self.generate_s(batch)
                case Drop(batch):
                    self._write("drop", batch)
                    self.dropped_ages[batch] = self.state.version - self.oldest.pop(batch)
                case Train(batch):
                    self._write("train", batch)
                    self.ages[batch] = self.state.version - self.oldest.pop(batch)
                    self.clock_s += self.train_s(batch)
                    came = Trained()
                case Sync(version):
                    self._write("sync", version)
                    came = Synced()
            self.most_in_hand = max(self.most_in_hand, len(self.state.in_hand))
        return came

    def _news(self) -> Generated:
        """The next batch that ends, if only that leads on, and all that have ended by then."""
        pending = {batch: self.ends[batch] for batch in self.state.in_hand if batch not in self.oldest}
        if self.state.waits and not any(end <= self.clock_s for end in pending.values()):
            assert pending, f"everybody waits for nothing: {self.state}"
            if self.state.phase is Phase.IDLE:
                self.idle.append((self.clock_s, min(pending.values())))
            self.clock_s = min(pending.values())
        for batch in sorted(pending, key=lambda batch: pending[batch]):
            if pending[batch] <= self.clock_s:
                room = self.state.version - self.begun[batch]
                self.oldest[batch] = self.begun[batch] + self.late(batch, room)
                self._write("done", batch)
        return Generated(dict(self.oldest))

    def _write(self, what: str, number: int) -> None:
        self.log.append(f"{what} {number}")
