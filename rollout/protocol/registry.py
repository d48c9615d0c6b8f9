"""The registry of engines in the job's store, and what each rank publishes about itself there (every rank)."""

import time
from contextlib import suppress

import msgspec
from torch import distributed as dist

from rollcast.comm import Deadline
from rollcast.rollout.errors import EngineError, Failure

POLL_S = 0.1


class EngineRegistry:
    """Addresses of the engines, which of them are lost and why, and whether the job is over."""

    def __init__(self, store: dist.Store, *, engines: int) -> None:
        self._store = store
        self.engines = engines

    def announce(self, engine: int, address: str) -> None:
        """Publish the address that an engine serves at (the engine's leader)."""
        self._store.set(f"address/{engine}", address)

    def report_lost(self, failure: Failure) -> None:
        """Publish that the failure's engine is lost (the engine's leader). Its phase is "start" or "run"."""
        assert failure.engine is not None
        self._store.set(f"lost/{failure.engine}", msgspec.json.encode(failure).decode())
        self._store.set("lost", "")

    def lost(self) -> dict[int, Failure]:
        """Return the engines that are lost, with the reason."""
        if not self._store.check(["lost"]):
            return {}
        engines = [engine for engine in range(self.engines) if self._store.check([f"lost/{engine}"])]
        return {engine: msgspec.json.decode(self._store.get(f"lost/{engine}"), type=Failure) for engine in engines}

    def addresses(self, *, deadline: Deadline) -> list[str]:
        """Wait until every engine serves (trainers). Raises `EngineError` as soon as one is lost."""
        return [self._address(engine, deadline) for engine in range(self.engines)]

    def _address(self, engine: int, deadline: Deadline) -> str:
        # Polled with check: a wait that times out makes torch write two warnings each time.
        while not self._store.check([f"address/{engine}"]):
            if failures := list(self.lost().values()):
                first = failures[0]
                message = f"engine {first.engine} did not start: {first.text}" if first.phase == "start" else ""
                raise EngineError(message, failures=failures)
            deadline.left(f"engine {engine} to start")
            time.sleep(POLL_S)
        return self._store.get(f"address/{engine}").decode()

    def finish(self) -> None:
        """Publish that the job is over (trainers): the engines may stop."""
        self._store.set("done", "")

    def done(self) -> bool:
        """Return whether the job is over."""
        return self._store.check(["done"])

    def finish_together(self, trainers: int) -> None:
        """Wait until all trainers have called this, or the job is over for another reason (trainers).

        Polled: it may take long, and a blocking wait would keep Python from handling a signal.
        """
        if self._store.add("through", 1) == trainers:
            self.finish()
        while not self.done():
            time.sleep(POLL_S)

    def report_stopped(self) -> None:
        """Publish that every process of an engine has stopped (the engine's leader)."""
        # The store may be gone by now; then nobody waits for this.
        with suppress(RuntimeError):
            self._store.add("left", 1)

    def all_stopped(self) -> bool:
        """Return whether every leader has stopped its engine."""
        return self._store.add("left", 0) >= self.engines


class RankInfo(msgspec.Struct, frozen=True):
    """What one rank runs on."""

    host: str
    gpu: str | None
    """UUID of the rank's GPU; None on CPU."""
    gpus_visible: int
    address: str = "127.0.0.1"
    """Address at which other machines reach the rank."""
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    """The rank's `NCCL_*` variables."""
    free_bytes: int = 0
    used_bytes: int = 0
    """Memory of the GPU before this job has used any."""
    links: dict[str, str] = msgspec.field(default_factory=dict)
    """Kind of link between the rank's GPU and each other GPU of the machine, by UUID."""
    problem: str = ""
    """Why the rank cannot take part; empty if it can."""
