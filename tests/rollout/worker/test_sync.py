"""One worker's side of a sync, called over its channel: what it refuses, and that it leaves its group on failure."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from rollcast.comm import Deadline, LaneGroups, PhaseTimer
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.messages import ReceiveResult
from rollcast.rollout.protocol.worker_channel import WorkerChannel, WorkerError
from rollcast.rollout.worker import WorkerSync
from rollcast.rollout.worker.model import WorkerModel

RECEIVE: dict[str, Any] = {
    "version": 1,
    "digests": ["other", "digest"],
    "slot": 0,
    "verify": "none",
    "unchanged": False,
    "timeout_s": 5.0,
}


class Worker:
    """What a sync needs of vLLM's worker, without a model."""

    rank = 0
    device = torch.device("cpu")
    model_runner = SimpleNamespace(get_model=nn.Module)

    def execute_model(self, scheduled: Any) -> None: ...

    def sample_tokens(self, grammar: Any) -> None: ...

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...


class Model(WorkerModel):
    """A model that needs no configuration of vLLM's."""

    def vllm_config(self) -> AbstractContextManager[None]:
        return nullcontext()


class FakeGroup:
    """A group whose trainer is ready."""

    low_priority = True
    closed = 0

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        self.closed += 1


class FakeReceiver:
    """Receives nothing: calls `meanwhile`, or fails."""

    planned = ()
    first_lane = 0
    prefetch_count = 0

    def __init__(self, digest: str, error: Exception | None = None) -> None:
        self.digest = digest
        self._error = error

    def receive(
        self, group: Any, *, deadline: Deadline, timer: PhaseTimer, checksums: bool, meanwhile: Callable[[], None]
    ) -> None:
        if self._error is not None:
            raise self._error
        with timer("wire"):
            meanwhile()


class FakeLanding:
    """Live tensors of which one has moved, or none."""

    def __init__(self, moved: str | None = None) -> None:
        self._moved = moved

    def moved(self, model: nn.Module) -> str | None:
        return self._moved


def new_sync() -> Any:
    sync: Any = WorkerSync(Worker())
    sync.model = Model(sync._worker)
    return sync


def call(sync: Any, method: str, *, phase: str = "receive", **arguments: Any) -> Any:
    """Call a method over a channel; return its result."""

    async def main() -> Any:
        channel = WorkerChannel(1)
        sync.connect(await channel.open(), workers=1, lora_versions=0)
        await asyncio.sleep(0.1)
        (result,) = await channel.call(method, phase=phase, **arguments)
        return result

    return asyncio.run(main())


def failing_call(sync: Any, method: str, **arguments: Any) -> Failure:
    with pytest.raises(WorkerError) as caught:
        call(sync, method, **arguments)
    (failure,) = caught.value.failures
    return failure


def joined(receiver: FakeReceiver, landing: FakeLanding) -> Any:
    """A worker in a group, whose live tensors were seen in their places."""
    sync = new_sync()
    group: Any = FakeGroup()
    sync.groups, sync.receiver, sync.landing = LaneGroups({0: group}), receiver, landing
    sync._other_calls_seen = 0
    return sync


def test_a_worker_without_a_group_refuses_to_receive() -> None:
    failure = failing_call(new_sync(), "receive", **RECEIVE)
    assert (failure.worker, failure.phase) == (0, "receive") and "has not joined its lanes' groups" in failure.text


def test_a_receive_returns_its_times_and_the_tokens_of_the_old_weights() -> None:
    sync = joined(FakeReceiver("other"), FakeLanding())
    groups, group = sync.groups, sync.groups[0]
    result = msgspec.convert(call(sync, "receive", **RECEIVE), ReceiveResult)
    assert result.tokens == {} and {"gate", "wire", "total"} <= result.phases_s.keys()
    assert sync.groups is groups and group.closed == 0 and group.low_priority is False


@pytest.mark.parametrize(
    ("receiver", "landing", "text"),
    [
        (FakeReceiver("other", RuntimeError("the wire broke")), FakeLanding(), "the wire broke"),
        (FakeReceiver("mine"), FakeLanding(), "version 1 was announced with another transfer plan"),
        (FakeReceiver("other"), FakeLanding("model.norm.weight"), "model.norm.weight was moved while weights were"),
    ],
    ids=["broken", "other plan", "moved"],
)
def test_a_receive_that_fails_leaves_the_group(receiver: FakeReceiver, landing: FakeLanding, text: str) -> None:
    sync = joined(receiver, landing)
    group = sync.groups[0]
    failure = failing_call(sync, "receive", **RECEIVE)
    assert text in failure.text and (failure.worker, failure.phase) == (0, "receive")
    assert sync.groups is None and group.closed == 1


def test_nothing_is_applied_before_it_was_received_into_spare_memory() -> None:
    failure = failing_call(joined(FakeReceiver("other"), FakeLanding()), "apply", phase="commit", timeout_s=5.0)
    assert failure.phase == "commit" and "sync again" in failure.text


def test_release_and_leave_can_be_called_at_any_time() -> None:
    sync = new_sync()
    for _ in range(2):
        sync.release()
        sync.leave()
    group: Any = FakeGroup()
    sync.groups = LaneGroups({0: group})
    sync.leave()
    assert sync.groups is None and group.closed == 1
