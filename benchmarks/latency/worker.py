"""The worker's side of the latency benchmark (every vLLM worker process, as `worker_extension_cls`)."""

import time
from typing import Any

import torch

from latency.facts import FactsWorker
from latency.memory import peak_bytes, settle
from rollcast.comm import Deadline, Group, join_group
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.worker.extension import RollcastWorker
from rollcast.rollout.worker.fingerprint import hashes


class BenchWorker(FactsWorker, RollcastWorker):
    """What the peers need in the worker, and what is measured there."""

    bench_group: Group | None = None
    bench_buffer: torch.Tensor | None = None
    bench_steps: list[tuple[Any, int]]
    bench_zero: tuple[float, Any]
    bench_execute: Any

    def bench_join(self, transport: str, address: str, timeout_s: float) -> None:
        """Join the peers' own group with the trainer, which is rank 0. Collective."""
        worker: Any = self
        deadline = Deadline(timeout_s)
        where: dict[str, Any] = {"device": worker.device, "name": "bench"}
        self.bench_group = join_group(transport, address, rank=1, size=2, deadline=deadline, **where)

    def bench_leave(self) -> None:
        """Leave the group. Idempotent."""
        if self.bench_group is not None:
            self.bench_group.close()
        self.bench_group = None

    def bench_receive(self, sizes: list[int], greet: bool, timeout_s: float) -> float:
        """Receive one broadcast of each size into one buffer; the time when all are there. Collective.

        `greet` first tells the trainer that this side is ready.
        """
        worker: Any = self
        group, deadline = self.bench_group, Deadline(timeout_s)
        assert group is not None
        if self.bench_buffer is None or self.bench_buffer.numel() < max(sizes):
            self.bench_buffer = torch.empty(max(sizes), dtype=torch.uint8, device=worker.device)
        buffer = self.bench_buffer
        hello = torch.zeros(1, dtype=torch.uint8, device=worker.device)
        works = [group.broadcast([hello], root=1, deadline=deadline)] if greet else []
        works += [group.broadcast([buffer[:size]], root=0, deadline=deadline) for size in sizes]
        for work in works:
            work.wait(deadline)
        return time.perf_counter()

    def bench_load(self, name: str, dtype: str, shape: list[int], timeout_s: float) -> None:
        """Receive one parameter into a temporary and hand it to vLLM's loader. Collective."""
        worker: Any = self
        group, deadline = self.bench_group, Deadline(timeout_s)
        assert group is not None
        weight = torch.empty(shape, dtype=getattr(torch, dtype), device=worker.device)
        group.broadcast([flat_bytes(weight)], root=0, deadline=deadline).wait(deadline)
        with torch.no_grad(), self._rollcast_settings():
            worker.model_runner.get_model().load_weights([(name, weight)])
        if weight.is_cuda:
            # The answer says that the weight is in place.
            torch.cuda.synchronize()

    def bench_hashes(self) -> dict[str, int]:
        """A 64-bit hash of every live tensor, made on its device."""
        return hashes(self._rollcast_model())

    def bench_settle(self) -> None:
        """Free what the last method left behind; start to watch the memory."""
        self.bench_buffer = None
        settle()

    def bench_peak(self) -> int:
        """Most bytes in use on this GPU since `bench_settle`."""
        return peak_bytes()

    def bench_watch(self) -> None:
        """Note the number of tokens of every step from now on, and when the model has run, by the GPU's own clock."""
        worker: Any = self
        steps = self.bench_steps = []
        execute = self.bench_execute = worker.execute_model
        self.bench_zero = bench_zero()

        def noting(scheduled: Any) -> Any:
            output = execute(scheduled)
            if scheduled.total_num_scheduled_tokens:
                steps.append((bench_now(), scheduled.total_num_scheduled_tokens))
            return output

        # On the instance: every executor looks the method up at every call.
        worker.execute_model = noting

    def bench_last_steps(self, count: int) -> list[tuple[float, int]]:
        """Time and tokens of the latest steps, of which the GPU may have some still to do."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [(bench_time(when, self.bench_zero), tokens) for when, tokens in self.bench_steps[-count:]]

    def bench_unwatch(self) -> list[tuple[float, int]]:
        """Stop; every step that was noted."""
        worker: Any = self
        # Not deleted: what was there is rollcast's own.
        worker.execute_model = self.bench_execute
        return self.bench_last_steps(len(self.bench_steps))


def bench_now() -> Any:
    """Now, or on a GPU when the current stream's work so far will be done."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def bench_zero() -> tuple[float, Any]:
    """One moment on the machine's clock and on the GPU's."""
    event = bench_now()
    if torch.cuda.is_available():
        event.synchronize()
    return time.perf_counter(), event


def bench_time(when: Any, zero: tuple[float, Any]) -> float:
    """A moment of `bench_now`, on the machine's clock."""
    return when if isinstance(when, float) else zero[0] + zero[1].elapsed_time(when) / 1e3


class PoolWorker(FactsWorker, RollcastWorker):
    """Worker of the pool's engine in `pool_overhead.py`: tells its settings."""
