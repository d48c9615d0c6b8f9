"""What trainers and engine leaders tell each other through the job's store (every rank)."""

import time
from contextlib import suppress

import msgspec
from torch import distributed as dist

from rollcast.comm import Deadline
from rollcast.rollout.errors import EngineError

POLL_S = 0.1


class Roster:
    """Addresses of the engines, which of them were lost and why, and whether the job is over."""

    def __init__(self, store: dist.Store, *, engines: int) -> None:
        self._store = store
        self.engines = engines

    def announce(self, engine: int, address: str) -> None:
        """Leader: the engine serves at `address`."""
        self._store.set(f"address/{engine}", address)

    def report_lost(self, engine: int, text: str) -> None:
        """Leader: the engine is gone; `text` says why."""
        self._store.set(f"lost/{engine}", text)
        self._store.set("lost", str(engine))

    def lost(self) -> dict[int, str]:
        """The engines that are gone, with the reason."""
        if not self._store.check(["lost"]):
            return {}
        gone = [engine for engine in range(self.engines) if self._store.check([f"lost/{engine}"])]
        return {engine: self._store.get(f"lost/{engine}").decode() for engine in gone}

    def addresses(self, *, deadline: Deadline) -> list[str]:
        """Trainer: wait until every engine serves. Raises `EngineError` as soon as one is lost."""
        return [self._address(engine, deadline) for engine in range(self.engines)]

    def _address(self, engine: int, deadline: Deadline) -> str:
        # Polled with check: a wait that times out makes torch write two warnings each time.
        while not self._store.check([f"address/{engine}"]):
            for gone, text in self.lost().items():
                raise EngineError(f"engine {gone} did not start: {text}")
            deadline.left(f"engine {engine} to start")
            time.sleep(POLL_S)
        return self._store.get(f"address/{engine}").decode()

    def finish(self) -> None:
        """Trainer: the job is over, the engines may stop."""
        self._store.set("done", "")

    def done(self) -> bool:
        """Whether the job is over."""
        return self._store.check(["done"])

    def finish_with(self, trainers: int) -> None:
        """Trainer: wait until all trainers are through, or the job is over for another reason.

        Polled: it may take long, and a blocking wait would keep Python from seeing a signal.
        """
        if self._store.add("through", 1) == trainers:
            self.finish()
        while not self.done():
            time.sleep(POLL_S)

    def leave(self) -> None:
        """Leader: everything of this engine is stopped."""
        # The store may be gone by now; then nobody waits.
        with suppress(RuntimeError):
            self._store.add("left", 1)

    def all_left(self) -> bool:
        """Whether every leader has stopped its engine."""
        return self._store.add("left", 0) >= self.engines


class Card(msgspec.Struct, frozen=True):
    """What one rank runs on."""

    host: str
    gpu: str | None
    """UUID of the rank's GPU; None on CPU."""
    gpus_visible: int
    address: str = "127.0.0.1"
    """Where other machines reach the rank."""
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    """Its `NCCL_*` variables."""
    free_bytes: int = 0
    used_bytes: int = 0
    """Memory of the GPU before anything of this job is on it."""
    links: dict[str, str] = msgspec.field(default_factory=dict)
    """How its GPU is joined to the machine's others, by UUID."""
    problem: str = ""
    """Why the rank cannot take part."""
