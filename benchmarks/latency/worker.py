"""The workers' side of the latency benchmark (every vLLM worker process, as `worker_extension_cls`)."""

import time
from typing import Any

import torch
from engine_facts import FactsWorker

from latency.memory import peak_bytes, reset_peak
from rollcast.comm import Deadline, Group, join_group
from rollcast.comm.device.storage import flat_bytes
from rollcast.rollout.worker import RollcastWorker
from rollcast.rollout.worker.fingerprint import fingerprint_64bit


class BenchWorker(FactsWorker, RollcastWorker):
    """Adds the worker's side of the methods that rollcast is compared with, and of the measurements."""

    bench_group: Group | None = None
    bench_buffer: torch.Tensor | None = None
    bench_steps: list[tuple[Any, int]]
    bench_zero: tuple[float, Any]
    bench_execute: Any

    def bench_join(self, transport: str, address: str, timeout_s: float) -> None:
        """Join the group of the methods that are not rollcast's: the trainer is rank 0. Collective."""
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
        """Receive one broadcast of each size into one buffer; return the time when all have arrived. Collective.

        With `greet` a broadcast of one byte first shows the trainer that this side is ready.
        """
        worker: Any = self
        group, deadline = self.bench_group, Deadline(timeout_s)
        assert group is not None
        if self.bench_buffer is None or self.bench_buffer.numel() < max(sizes):
            self.bench_buffer = torch.empty(max(sizes), dtype=torch.uint8, device=worker.device)
        buffer = self.bench_buffer
        greeting = torch.zeros(1, dtype=torch.uint8, device=worker.device)
        works = [group.broadcast([greeting], root=1, deadline=deadline)] if greet else []
        works += [group.broadcast([buffer[:size]], root=0, deadline=deadline) for size in sizes]
        for work in works:
            work.wait(deadline)
        return time.perf_counter()

    def bench_load(self, name: str, dtype: str, shape: list[int], timeout_s: float) -> None:
        """Receive one parameter into a temporary tensor and load it with vLLM's loader. Collective."""
        worker: Any = self
        group, deadline = self.bench_group, Deadline(timeout_s)
        assert group is not None
        weight = torch.empty(shape, dtype=getattr(torch, dtype), device=worker.device)
        group.broadcast([flat_bytes(weight)], root=0, deadline=deadline).wait(deadline)
        model: Any = self.rollcast_sync.model.module
        with torch.no_grad(), self.rollcast_sync.model.vllm_config():
            model.load_weights([(name, weight)])
        if weight.is_cuda:
            # The trainer takes the return of this call for the end of the load.
            torch.cuda.synchronize()

    def bench_fingerprint(self) -> dict[str, int]:
        """Return a 64-bit checksum of every parameter and buffer, computed on its device."""
        sums = fingerprint_64bit(self.rollcast_sync.model.module)
        # Plain attributes, "module:name", may be work space that decoding fills.
        return {name: each for name, each in sums.items() if ":" not in name}

    def bench_reset_peak(self) -> None:
        """Free what the last method left behind, and measure the peak of the memory from now on."""
        self.bench_buffer = None
        reset_peak()

    def bench_peak(self) -> int:
        """Return the most bytes in use on this GPU since `bench_reset_peak`."""
        return peak_bytes()

    def bench_watch(self) -> None:
        """Record the tokens of every step from now on, and when the model has run, by the GPU's own clock."""
        worker: Any = self
        steps = self.bench_steps = []
        execute = self.bench_execute = worker.execute_model
        self.bench_zero = bench_zero()

        def execute_and_record(scheduled: Any) -> Any:
            output = execute(scheduled)
            if scheduled.total_num_scheduled_tokens:
                steps.append((bench_now(), scheduled.total_num_scheduled_tokens))
            return output

        # On the instance: every executor looks the method up at every call.
        worker.execute_model = execute_and_record

    def bench_last_steps(self, count: int) -> list[tuple[float, int]]:
        """Return time and tokens of the latest steps, after the GPU has run them all."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [(bench_time(when, self.bench_zero), tokens) for when, tokens in self.bench_steps[-count:]]

    def bench_unwatch(self) -> list[tuple[float, int]]:
        """Stop recording; return every step that was recorded."""
        worker: Any = self
        # Not deleted: rollcast wraps this method of the instance, too.
        worker.execute_model = self.bench_execute
        return self.bench_last_steps(len(self.bench_steps))


def bench_now() -> Any:
    """Return the present, or on a GPU the moment when the current stream's work so far will be done."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def bench_zero() -> tuple[float, Any]:
    """Return one moment on the machine's clock and on the GPU's."""
    event = bench_now()
    if torch.cuda.is_available():
        event.synchronize()
    return time.perf_counter(), event


def bench_time(when: Any, zero: tuple[float, Any]) -> float:
    """Return a moment of `bench_now` on the machine's clock, in seconds."""
    return when if isinstance(when, float) else zero[0] + zero[1].elapsed_time(when) / 1e3
