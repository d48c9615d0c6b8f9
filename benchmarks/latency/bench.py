"""State that all methods of the latency benchmark share: weights, engine, version, a group (trainer)."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from latency.memory import peak_bytes, reset_peak
from latency.spec import JobSpec
from rollcast.comm import Deadline, Group, SyncReport, host_store, join_group
from rollcast.comm.transport import Work
from rollcast.rollout import Job
from rollcast.rollout.protocol.messages import Call, Called, Reply, expect

RPC_TIMEOUT_S = 120.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Sample:
    """One timed update."""

    seconds: float
    phases_s: dict[str, float] = field(default_factory=dict)


Run = Callable[[], Sample]


class Bench:
    """One trainer with its weights, and one engine.

    Weights change by negation alone: an update changes every value, and the engine is compared with two states.
    """

    def __init__(self, job: Job, spec: JobSpec, weights: dict[str, torch.Tensor]) -> None:
        self.spec = spec
        self.weights = weights
        self.pool = job.pool
        self.device = next(iter(weights.values())).device
        self.nbytes = sum(tensor.nbytes for tensor in weights.values())
        self.version = 0
        self._job = job
        self._broadcaster = job.broadcaster(weights)
        self._store: Any = None
        self._group: Group | None = None
        self._negated = False
        # By whether the weights are negated.
        self._expected: dict[bool, dict[str, int]] = {}

    def sync(self, **arguments: Any) -> SyncReport:
        """Sync by rollcast."""
        self.version += 1
        return self._broadcaster.sync(version=self.version, **arguments)

    def use_transport(self, transport: str) -> None:
        """Sync by this transport from now on; the next sync joins its groups."""
        self._broadcaster = self._job.broadcaster(self.weights, transport=transport)

    def negate(self) -> None:
        """Negate every weight and wait until that is done."""
        torch._foreach_neg_(list(self.weights.values()))
        self._negated = not self._negated
        self.synchronize()

    def record_fingerprints(self) -> None:
        """Sync both states by rollcast, verified bit by bit, and record the engine's fingerprint of each."""
        for _ in range(2):
            self.negate()
            self.sync(verify="full")
            self._expected[self._negated] = self.call("bench_fingerprint")

    def correct(self) -> bool:
        """Return whether the engine's tensors are those of the trainer's current weights."""
        return self.call("bench_fingerprint") == self._expected[self._negated]

    def synchronize(self) -> None:
        """Wait for this process's GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, run: Run) -> Sample:
        """Run one update with weights that the engine does not have."""
        self.negate()
        return run()

    def start(self, method: str, *args: Any) -> "Future[Reply]":
        """Call a method of the worker without waiting."""
        return self.pool.client.request(0, Call(method, list(args)))

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker and return its result."""
        return result_of(self.start(method, *args))

    def receive(self, method: str, *args: Any) -> "Future[Reply]":
        """Call a method that takes part in broadcasts of the group; if it fails, waits for them end at once."""
        group = self.group()

        def leave_if_failed(done: "Future[Reply]") -> None:
            if done.exception():
                group.close()

        receiving = self.start(method, *args)
        receiving.add_done_callback(leave_if_failed)
        return receiving

    def release(self) -> None:
        """Free on both sides what rollcast keeps between syncs: spare memory, mapped memory, views."""
        self._broadcaster.release()

    def reset_peak(self) -> None:
        """Free unused memory on both sides and start a new peak."""
        reset_peak()
        self.call("bench_reset_peak")

    def peak(self) -> dict[str, int]:
        """Return the most bytes in use since `reset_peak`, by side."""
        return {"engine": self.call("bench_peak"), "trainer": peak_bytes()}

    def group(self) -> Group:
        """Return a group of one of rollcast's transports for the methods that are not rollcast; joined once."""
        if self._group is None:
            deadline = Deadline(RPC_TIMEOUT_S)
            transport = "nccl" if self.device.type == "cuda" else "gloo"
            self._store, address = host_store(HOST, timeout_s=RPC_TIMEOUT_S)
            joining = self.start("bench_join", transport, address, deadline.left_s())
            where: dict[str, Any] = {"device": self.device, "name": "bench"}
            self._group = join_group(transport, self._store, rank=0, size=2, deadline=deadline, **where)
            result_of(joining)
        return self._group

    def close_group(self) -> None:
        """Leave the group on both sides. Idempotent."""
        if self._group is not None:
            self._group.close()
            self.call("bench_leave")
        self._group = self._store = None


def result_of(future: "Future[Reply]") -> Any:
    """Wait for a worker's method and return its result. Raises `EngineError` with the worker's error."""
    (result,) = expect(future.result(RPC_TIMEOUT_S), Called).results
    return result


def wait_for_broadcasts(works: Sequence[Work], receiving: "Future[Reply]") -> None:
    """Wait for broadcasts of the group. Raises the worker's error if it has one."""
    deadline = Deadline(RPC_TIMEOUT_S)
    try:
        for work in works:
            work.wait(deadline)
    except RuntimeError:
        if receiving.done():
            result_of(receiving)
        raise
