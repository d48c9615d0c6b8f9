"""Calls from the engine process to its workers: results by rank, failures as records, and no wait without an end."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from rollcast.comm import Deadline
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.worker_channel import WorkerChannel, WorkerEndpoint, WorkerError

Run = Callable[[str, dict[str, Any], Deadline], Any]
# The phase of every failure here, whatever the method.
PHASE = "commit"


async def connect(channel: WorkerChannel, *runs: Run) -> list[WorkerEndpoint]:
    """One endpoint for each `run`, connected to the channel."""
    address = await channel.open()
    endpoints = [WorkerEndpoint(address, rank=rank, workers=len(runs), run=run) for rank, run in enumerate(runs)]
    await asyncio.sleep(0.1)
    return endpoints


async def failing_call(
    channel: WorkerChannel, method: str, *, timeout_s: float, within_s: float
) -> tuple[Failure, ...]:
    """Call a method that must fail within this time; the failures."""
    with pytest.raises(WorkerError) as caught:
        await asyncio.wait_for(channel.call(method, phase=PHASE, timeout_s=timeout_s), within_s)
    return caught.value.failures


def test_the_first_failure_is_raised_at_once_and_the_next_call_is_answered() -> None:
    slow = threading.Event()

    def run(rank: int) -> Run:
        def act(method: str, arguments: dict[str, Any], deadline: Deadline) -> Any:
            if method == "fail" and rank == 1:
                raise ValueError("it did not want to")
            if method == "fail":
                slow.wait(5.0)
            return [rank, method, arguments, 0.0 < deadline.left_s() <= deadline.timeout_s]

        return act

    async def main() -> list[Any]:
        channel = WorkerChannel(2)
        _ = await connect(channel, run(0), run(1))
        failures = await failing_call(channel, "fail", timeout_s=60.0, within_s=2.0)
        assert failures == (Failure(text="it did not want to", worker=1, phase=PHASE),)
        asyncio.get_running_loop().call_later(0.2, slow.set)
        return await channel.call("echo", phase=PHASE, timeout_s=5.0, a=[1, 2], b="c")

    assert asyncio.run(main()) == [[rank, "echo", {"a": [1, 2], "b": "c"}, True] for rank in range(2)]


def test_an_exception_without_a_text_is_named_by_its_type() -> None:
    def run(method: str, arguments: dict[str, Any], deadline: Deadline) -> None:
        raise KeyError

    async def main() -> None:
        channel = WorkerChannel(1)
        _ = await connect(channel, run)
        failures = await failing_call(channel, "apply", timeout_s=5.0, within_s=2.0)
        assert failures == (Failure(text="KeyError", worker=0, phase=PHASE),)
        assert str(WorkerError(failures)) == "worker 0: KeyError"

    asyncio.run(main())


def test_a_worker_that_ends_is_named_and_not_called_again() -> None:
    async def main() -> None:
        channel = WorkerChannel(2)
        endpoints = await connect(channel, *[lambda method, arguments, deadline: time.sleep(1.0)] * 2)
        calling = asyncio.create_task(failing_call(channel, "wait", timeout_s=60.0, within_s=2.0))
        await asyncio.sleep(0.1)
        endpoints[1]._connection.close()
        (failure,) = await calling
        assert (failure.worker, failure.phase) == (1, PHASE) and "has ended" in failure.text
        (failure,) = await failing_call(channel, "wait", timeout_s=60.0, within_s=0.5)
        assert (failure.worker, failure.phase) == (1, PHASE) and "not connected" in failure.text

    asyncio.run(main())


def test_workers_that_never_connected_are_named() -> None:
    async def main() -> None:
        channel = WorkerChannel(2)
        _ = await channel.open()
        failures = await failing_call(channel, "receive", timeout_s=60.0, within_s=0.5)
        assert [failure.worker for failure in failures] == [0, 1]

    asyncio.run(main())


def test_a_frozen_worker_is_named_after_the_deadline() -> None:
    thawed = threading.Event()

    def freeze(method: str, arguments: dict[str, Any], deadline: Deadline) -> str:
        thawed.wait(5.0)
        return method

    async def main() -> list[str]:
        channel = WorkerChannel(2)
        _ = await connect(channel, lambda method, arguments, deadline: method, freeze)
        start = time.perf_counter()
        (failure,) = await failing_call(channel, "receive", timeout_s=0.5, within_s=3.0)
        assert 0.5 < time.perf_counter() - start < 2.0
        assert (failure.worker, failure.phase) == (1, PHASE)
        assert failure.text == "no reply to 'receive' by its deadline of 0.5 s"
        # Its late reply is not taken for that to the next call.
        asyncio.get_running_loop().call_later(0.2, thawed.set)
        return await channel.call("apply", phase=PHASE, timeout_s=5.0)

    assert asyncio.run(main()) == ["apply", "apply"]


def test_a_worker_that_meets_the_deadline_itself_says_what_it_waited_for() -> None:
    def run(method: str, arguments: dict[str, Any], deadline: Deadline) -> None:
        time.sleep(deadline.left_s())
        deadline.left("the trainer's first bucket")

    async def main() -> None:
        channel = WorkerChannel(1)
        _ = await connect(channel, run)
        (failure,) = await failing_call(channel, "receive", timeout_s=2.0, within_s=5.0)
        assert "the trainer's first bucket" in failure.text

    asyncio.run(main())


def test_a_call_without_time_fails() -> None:
    async def main() -> None:
        channel = WorkerChannel(1)
        _ = await connect(channel, lambda method, arguments, deadline: method)
        (failure,) = await failing_call(channel, "receive", timeout_s=0.0, within_s=5.0)
        assert failure.worker == 0
        assert await channel.call("apply", phase=PHASE, timeout_s=5.0) == ["apply"]

    asyncio.run(main())


def test_a_new_call_supersedes_one_that_is_under_way_and_frees_who_waits_in_it() -> None:
    agreed: list[str] = []

    async def main() -> None:
        channel = WorkerChannel(2)
        endpoints: list[WorkerEndpoint] = []

        def agree(method: str, arguments: dict[str, Any], deadline: Deadline) -> int:
            calls = endpoints[0].agree(3, deadline=deadline)
            agreed.append(method)
            return calls

        def follow(method: str, arguments: dict[str, Any], deadline: Deadline) -> int:
            if method == "receive":
                # It never takes part.
                time.sleep(0.5)
                return 0
            return endpoints[1].agree(5, deadline=deadline)

        endpoints += await connect(channel, agree, follow)
        first = asyncio.create_task(channel.call("receive", phase=PHASE, timeout_s=60.0))
        await asyncio.sleep(0.1)
        assert await channel.call("apply", phase=PHASE, timeout_s=5.0) == [5, 5]
        with pytest.raises(WorkerError) as caught:
            await first
        assert caught.value.failures == (Failure(text="superseded by another call", phase=PHASE),)

    asyncio.run(main())
    assert agreed == ["apply"]
