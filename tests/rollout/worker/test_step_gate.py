"""Weights change between two calls of a worker, at the same place in all workers of an engine."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollcast.comm import Deadline
from rollcast.rollout.protocol.worker_channel import WorkerChannel, WorkerEndpoint, WorkerError
from rollcast.rollout.worker.step_gate import StepGate

STEP_S = 0.002


def schedule() -> Any:
    return SimpleNamespace(
        num_scheduled_tokens={},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[], num_output_tokens=[]),
        finished_req_ids=set(),
    )


class Worker:
    """What a gate needs of vLLM's worker; a step is in two parts, as vLLM's."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.steps = 0
        self.inside = False

    def execute_model(self, scheduled: Any) -> None:
        self.inside = True
        time.sleep(STEP_S)

    def sample_tokens(self, grammar: Any) -> str:
        time.sleep(STEP_S)
        self.inside = False
        self.steps += 1
        return "tokens"

    def sleep(self) -> None:
        self.inside = True
        time.sleep(STEP_S)
        self.inside = False

    def wake_up(self) -> None: ...

    def step(self) -> None:
        self.execute_model(schedule())
        assert self.sample_tokens(None) == "tokens"


class Engine:
    """Workers that run the same steps, in each of which they wait for each other, as tensor parallel ones do."""

    def __init__(self, count: int) -> None:
        self.workers = [Worker() for _ in range(count)]
        self.all_reduce = threading.Barrier(count)
        for worker in self.workers:
            worker.sample_tokens = lambda grammar, sample=worker.sample_tokens: (
                self.all_reduce.wait(5.0),
                sample(None),
            )[1]
        self.gates = [StepGate(worker) for worker in self.workers]
        self.threads = ThreadPoolExecutor(3 * count)

    def run(self) -> "list[Future[None]]":
        return [self.threads.submit(self._run, worker, index) for index, worker in enumerate(self.workers)]

    def _run(self, worker: Worker, index: int) -> None:
        while worker.steps < 100:
            worker.step()
            time.sleep(STEP_S * index)


def steps_before_change(gate: StepGate, worker: Worker, endpoint: WorkerEndpoint, deadline: Deadline) -> int:
    """Close the gate for some steps' time, in which there must be none; return the number of steps before."""
    with gate.closed(lambda calls: endpoint.agree(calls, deadline=deadline), deadline=deadline):
        before = worker.steps
        for _ in range(5):
            assert not worker.inside and worker.steps == before
            time.sleep(STEP_S)
    return before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_workers_stop_at_the_same_step_and_go_on(count: int) -> None:
    engine = Engine(count)

    async def main() -> list[list[int]]:
        channel = WorkerChannel(count)
        address = await channel.open()
        endpoints: list[WorkerEndpoint] = []

        def change(rank: int, deadline: Deadline) -> int:
            return steps_before_change(engine.gates[rank], engine.workers[rank], endpoints[rank], deadline)

        endpoints += [
            WorkerEndpoint(
                address,
                rank=rank,
                workers=count,
                run=lambda method, arguments, deadline, rank=rank: change(rank, deadline),
            )
            for rank in range(count)
        ]
        await asyncio.sleep(0.1)
        running = engine.run()
        changes = []
        while not all(future.done() for future in running):
            changes.append(await channel.call("change", phase="receive", timeout_s=10.0))
        for future in running:
            future.result()
        return changes

    changes = asyncio.run(main())
    assert len(changes) > 3 and all(len(set(steps)) == 1 for steps in changes), changes
    assert [worker.steps for worker in engine.workers] == [100] * count


def test_other_calls_wait_at_the_gate_too() -> None:
    worker = Worker()
    gate = StepGate(worker)
    with ThreadPoolExecutor(1) as thread:
        with gate.closed(lambda calls: calls, deadline=Deadline(5.0)):
            sleeping = thread.submit(worker.sleep)
            time.sleep(0.05)
            assert not worker.inside and not sleeping.done()
        sleeping.result(5.0)
    assert gate.other_calls == 1


def test_a_step_that_fails_is_over() -> None:
    worker = Worker()

    def fail(scheduled: Any) -> None:
        raise ValueError("it fails")

    worker.execute_model = fail  # type: ignore[method-assign]
    gate = StepGate(worker)
    with pytest.raises(ValueError, match="it fails"):
        worker.execute_model(schedule())
    with gate.closed(lambda calls: calls, deadline=Deadline(1.0)):
        pass


def test_a_step_without_end_fails_the_change_and_opens_the_gate() -> None:
    worker = Worker()
    gate = StepGate(worker)
    worker.execute_model(schedule())
    closed = gate.closed(lambda calls: calls, deadline=Deadline(0.1))
    with pytest.raises(TimeoutError, match="step under way"), closed:
        pass
    worker.sample_tokens(None)
    worker.step()


def test_a_worker_that_fails_early_opens_the_gates_of_the_others() -> None:
    worker = Worker()
    gate = StepGate(worker)

    async def main() -> float:
        channel = WorkerChannel(2)
        address = await channel.open()
        endpoints: list[WorkerEndpoint] = []

        def change(method: str, arguments: dict[str, Any], deadline: Deadline) -> int:
            return steps_before_change(gate, worker, endpoints[0], deadline)

        def fail(method: str, arguments: dict[str, Any], deadline: Deadline) -> None:
            time.sleep(0.3)
            raise RuntimeError("it cannot")

        endpoints += [WorkerEndpoint(address, rank=0, workers=2, run=change)]
        endpoints += [WorkerEndpoint(address, rank=1, workers=2, run=fail)]
        await asyncio.sleep(0.1)
        with pytest.raises(WorkerError, match="worker 1: it cannot"):
            await channel.call("change", phase="receive", timeout_s=5.0)
        start = time.perf_counter()
        await asyncio.to_thread(worker.sleep)
        return time.perf_counter() - start

    assert asyncio.run(main()) < 1.0
