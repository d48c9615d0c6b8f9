"""What all methods of the latency benchmark share: weights, engine, version, the peers' group (trainer)."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from latency.memory import peak_bytes, settle
from latency.spec import JobSpec
from rollcast.comm import Deadline, Group, SyncReport, host_store, join_group
from rollcast.comm.transport.base import Work
from rollcast.rollout import Job
from rollcast.rollout.protocol.messages import Call, Called, Reply, expect

RPC_TIMEOUT_S = 120.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Sample:
    """One update, as the trainer saw it."""

    seconds: float
    phases_s: dict[str, float] = field(default_factory=dict)


Run = Callable[[], Sample]


class Bench:
    """One trainer with its weights, one engine.

    The weights are only ever negated: so every byte that is sent changes, and there are two states to compare
    the engine with.
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
        self._wanted: dict[bool, dict[str, int]] = {}

    def sync(self, **arguments: Any) -> SyncReport:
        """rollcast's own update."""
        self.version += 1
        return self._broadcaster.sync(version=self.version, **arguments)

    def travel(self, transport: str) -> None:
        """From now on rollcast's updates go by this transport; the next one joins."""
        self._broadcaster = self._job.broadcaster(self.weights, transport=transport)

    def flip(self) -> None:
        """Change every weight; return when that is done."""
        torch._foreach_neg_(list(self.weights.values()))
        self._negated = not self._negated
        self.synchronize()

    def learn(self) -> None:
        """Let rollcast bring both states to the engine, checked bit by bit, and note what the engine then has."""
        for _ in range(2):
            self.flip()
            self.sync(verify="full")
            self._wanted[self._negated] = self.call("bench_hashes")

    def correct(self) -> bool:
        """Whether every tensor of the engine is what the trainer's weights make."""
        return self.call("bench_hashes") == self._wanted[self._negated]

    def synchronize(self) -> None:
        """Wait for this process's GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, run: Run) -> Sample:
        """One update with weights that the engine does not have."""
        self.flip()
        return run()

    def start(self, method: str, *args: Any) -> "Future[Reply]":
        """Make the worker call a method, and do not wait."""
        return self.pool.request(0, Call(method, list(args)))

    def call(self, method: str, *args: Any) -> Any:
        """The worker's answer."""
        return answer(self.start(method, *args))

    def receive(self, method: str, *args: Any) -> "Future[Reply]":
        """Make the worker take part in broadcasts of the group; if it fails, waits for them end at once."""
        group = self.group()

        def leave_if_failed(done: "Future[Reply]") -> None:
            if done.exception():
                group.close()

        receiving = self.start(method, *args)
        receiving.add_done_callback(leave_if_failed)
        return receiving

    def release(self) -> None:
        """Both sides let go of what rollcast's updates keep: spare memory, mapped memory, views."""
        self._broadcaster.release()

    def settle(self) -> None:
        """Both sides give memory back and start to watch its peak."""
        settle()
        self.call("bench_settle")

    def peak(self) -> dict[str, int]:
        """Most bytes in use on both GPUs since `settle`."""
        return {"engine": self.call("bench_peak"), "trainer": peak_bytes()}

    def group(self) -> Group:
        """A group of rollcast's transport for the peers; made once."""
        if self._group is None:
            deadline = Deadline(RPC_TIMEOUT_S)
            transport = "nccl" if self.device.type == "cuda" else "gloo"
            self._store, address = host_store(HOST, timeout_s=RPC_TIMEOUT_S)
            joining = self.start("bench_join", transport, address, deadline.left_s())
            where: dict[str, Any] = {"device": self.device, "name": "bench"}
            self._group = join_group(transport, self._store, rank=0, size=2, deadline=deadline, **where)
            answer(joining)
        return self._group

    def close_group(self) -> None:
        """Both sides leave it. Idempotent."""
        if self._group is not None:
            self._group.close()
            self.call("bench_leave")
        self._group = self._store = None


def answer(future: "Future[Reply]") -> Any:
    """What the method returned, once it has. Raises `EngineError` with the worker's words."""
    (result,) = expect(future.result(RPC_TIMEOUT_S), Called).results
    return result


def wait_for(works: Sequence[Work], receiving: "Future[Reply]") -> None:
    """Wait for broadcasts of the group. Raises the worker's words if there are any."""
    deadline = Deadline(RPC_TIMEOUT_S)
    try:
        for work in works:
            work.wait(deadline)
    except RuntimeError:
        if receiving.done():
            answer(receiving)
        raise


def elapsed(act: Callable[[], Any]) -> Sample:
    """Time an act."""
    start = time.perf_counter()
    act()
    return Sample(time.perf_counter() - start)
