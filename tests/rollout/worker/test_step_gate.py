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
from rollcast.rollout.protocol.worker_channel import Bell, Bells
from rollcast.rollout.worker.step_gate import Gate

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
    """Workers that make the same steps, of which each waits for the others half way, as tensor parallel ones do."""

    def __init__(self, count: int) -> None:
        self.workers = [Worker() for _ in range(count)]
        self.meeting = threading.Barrier(count)
        for worker in self.workers:
            worker.sample_tokens = lambda grammar, sample=worker.sample_tokens: (self.meeting.wait(5.0), sample(None))[
                1
            ]
        self.gates = [Gate(worker) for worker in self.workers]
        self.going = True
        self.threads = ThreadPoolExecutor(3 * count)

    def run(self) -> "list[Future[None]]":
        return [self.threads.submit(self._run, worker, index) for index, worker in enumerate(self.workers)]

    def _run(self, worker: Worker, index: int) -> None:
        while worker.steps < 100:
            worker.step()
            time.sleep(STEP_S * index)


def changed(gate: Gate, worker: Worker, bell: Bell) -> int:
    """Watch the gate while it is closed; the number of steps before."""
    deadline = Deadline(5.0)
    with gate.closed(lambda passed: bell.agree(passed, deadline=deadline), deadline=deadline):
        before = worker.steps
        for _ in range(5):
            assert not worker.inside and worker.steps == before
            time.sleep(STEP_S)
    return before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_workers_stop_at_the_same_step_and_go_on(count: int) -> None:
    engine = Engine(count)

    async def main() -> list[list[int]]:
        bells = Bells(count)
        address = await bells.open()
        made: list[Bell] = []

        def answer(rank: int) -> Any:
            return lambda method, args: [None, changed(engine.gates[rank], engine.workers[rank], made[rank])]

        made += [Bell(address, rank=rank, workers=count, run=answer(rank)) for rank in range(count)]
        await asyncio.sleep(0.1)
        running = engine.run()
        found = []
        while not all(future.done() for future in running):
            found.append(await asyncio.wait_for(bells.ring("change"), 10.0))
        for future in running:
            future.result()
        return found

    found = asyncio.run(main())
    assert len(found) > 3 and all(len(set(places)) == 1 for places in found), found
    assert [worker.steps for worker in engine.workers] == [100] * count


def test_other_calls_wait_at_the_gate_too() -> None:
    worker = Worker()
    gate = Gate(worker)
    with ThreadPoolExecutor(1) as thread:
        with gate.closed(lambda passed: passed, deadline=Deadline(5.0)):
            sleeping = thread.submit(worker.sleep)
            time.sleep(0.05)
            assert not worker.inside and not sleeping.done()
        sleeping.result(5.0)


def test_a_step_that_fails_is_over() -> None:
    worker = Worker()

    def fail(scheduled: Any) -> None:
        raise ValueError("it fails")

    worker.execute_model = fail  # type: ignore[method-assign]
    gate = Gate(worker)
    with pytest.raises(ValueError, match="it fails"):
        worker.execute_model(schedule())
    with gate.closed(lambda passed: passed, deadline=Deadline(1.0)):
        pass


def test_a_step_without_end_fails_the_change_and_opens_the_gate() -> None:
    worker = Worker()
    gate = Gate(worker)
    worker.execute_model(schedule())
    closed = gate.closed(lambda passed: passed, deadline=Deadline(0.1))
    with pytest.raises(TimeoutError, match="step under way"), closed:
        pass
    worker.sample_tokens(None)
    worker.step()


def test_the_first_workers_words_are_heard_and_the_next_ring_is_answered() -> None:
    async def main() -> list[Any]:
        bells = Bells(2)
        address = await bells.open()
        slow = threading.Event()

        def run(rank: int, method: str, args: list[Any]) -> list[Any]:
            if method == "fail" and rank == 1:
                return ["worker 1 did not want to", None]
            if method == "fail":
                slow.wait(5.0)
            return [None, [rank, *args]]

        for rank in range(2):
            Bell(address, rank=rank, workers=2, run=lambda method, args, rank=rank: run(rank, method, args))
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="worker 1 did not want to"):
            await asyncio.wait_for(bells.ring("fail"), 2.0)
        asyncio.get_running_loop().call_later(0.2, slow.set)
        return await asyncio.wait_for(bells.ring("echo", "a", 3), 5.0)

    assert asyncio.run(main()) == [[0, "a", 3], [1, "a", 3]]


def test_a_worker_that_fails_early_opens_the_gates_of_the_others() -> None:
    worker = Worker()
    gate = Gate(worker)

    async def main() -> float:
        bells = Bells(2)
        address = await bells.open()
        made: list[Bell] = []

        def wait(method: str, args: list[Any]) -> list[Any]:
            try:
                return [None, changed(gate, worker, made[0])]
            except RuntimeError as error:
                return [str(error), None]

        made += [Bell(address, rank=0, workers=2, run=wait)]
        made += [Bell(address, rank=1, workers=2, run=lambda method, args: time.sleep(0.3) or ["it cannot", None])]
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="it cannot"):
            await bells.ring("change")
        start = time.perf_counter()
        await asyncio.to_thread(worker.sleep)
        return time.perf_counter() - start

    assert asyncio.run(main()) < 1.0


def test_a_worker_that_ends_is_named() -> None:
    async def main() -> None:
        bells = Bells(1)
        address = await bells.open()
        bell = Bell(address, rank=0, workers=1, run=lambda method, args: [None, time.sleep(5.0)])
        await asyncio.sleep(0.1)
        ringing = asyncio.create_task(bells.ring("wait"))
        await asyncio.sleep(0.1)
        bell._line.close()
        with pytest.raises(RuntimeError, match="worker 0 has ended"):
            await asyncio.wait_for(ringing, 2.0)
        with pytest.raises(RuntimeError, match="worker 0 cannot be reached"):
            await bells.ring("wait")

    asyncio.run(main())
