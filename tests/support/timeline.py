"""A job on a simulated clock: the durations are given, the events are logged."""

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
    """Runs the table of decisions with a clock in place of engines and trainers."""

    mode: Mode
    steps: int
    generate_s: Callable[[int], float]
    train_s: Callable[[int], float] = lambda batch: 1.0
    late: Callable[[int, int], int] = lambda batch, room: 0
    """How many of the `room` versions synced while a batch was generated came before its first token."""
    clock_s: float = 0.0
    log: list[str] = field(default_factory=list)
    ages: dict[int, int] = field(default_factory=dict)
    """By batch that was trained on: its age then."""
    dropped_ages: dict[int, int] = field(default_factory=dict)
    most_in_hand: int = 0
    idle: list[tuple[float, float]] = field(default_factory=list)
    """Times in which training waited for a batch: start, end."""
    ends: dict[int, float] = field(default_factory=dict)
    """By batch: when its generation ended."""

    def __post_init__(self) -> None:
        self.state = State(mode=self.mode, steps=self.steps, version=0)
        self.started: dict[int, int] = {}
        self.oldest: dict[int, int] = {}

    def run(self) -> "Timeline":
        event: Event = Started()
        while self.state.phase is not Phase.OVER:
            event = self._perform(event) or self._generated()
        return self

    def _perform(self, event: Event) -> Event | None:
        following = None
        for action in self.state.step(event):
            match action:
                case Generate(batch):
                    self._log("generate", batch)
                    self.started[batch] = self.state.version
                    self.ends[batch] = self.clock_s + self.generate_s(batch)
                case Drop(batch):
                    self._log("drop", batch)
                    self.dropped_ages[batch] = self.state.version - self.oldest.pop(batch)
                case Train(batch):
                    self._log("train", batch)
                    self.ages[batch] = self.state.version - self.oldest.pop(batch)
                    self.clock_s += self.train_s(batch)
                    following = Trained()
                case Sync(version):
                    self._log("sync", version)
                    following = Synced()
            self.most_in_hand = max(self.most_in_hand, len(self.state.in_hand))
        return following

    def _generated(self) -> Generated:
        """Return all batches that have ended; if nothing else can happen, advance to the end of the next one."""
        pending = {batch: self.ends[batch] for batch in self.state.in_hand if batch not in self.oldest}
        if self.state.waits and not any(end <= self.clock_s for end in pending.values()):
            assert pending, f"no batch to wait for: {self.state}"
            if self.state.phase is Phase.IDLE:
                self.idle.append((self.clock_s, min(pending.values())))
            self.clock_s = min(pending.values())
        for batch in sorted(pending, key=lambda batch: pending[batch]):
            if pending[batch] <= self.clock_s:
                room = self.state.version - self.started[batch]
                self.oldest[batch] = self.started[batch] + self.late(batch, room)
                self._log("done", batch)
        return Generated(dict(self.oldest))

    def _log(self, what: str, number: int) -> None:
        self.log.append(f"{what} {number}")
