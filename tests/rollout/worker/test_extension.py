"""What vLLM sees of rollcast in its worker: prefixed methods that never raise, over an object of their own."""

from typing import Any

import msgspec
import pytest

from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.worker_channel import CallOutcome
from rollcast.rollout.worker import RollcastWorker, WorkerSync


class RecordingSync(WorkerSync):
    """Remembers that it left the group."""

    left = 0

    def leave(self) -> None:
        self.left += 1


class Extended(RollcastWorker):
    """An extension as tests and users write them."""

    rollcast_sync_class = RecordingSync
    rank = 3

    def divide(self, dividend: int, divisor: int) -> float:
        return dividend / divisor

    def plan_bytes(self) -> list[Any]:
        return [b"\x00\xff", {1: None}]

    def unsendable(self) -> object:
        return object()


def call(worker: RollcastWorker, method: str, arguments: list[Any], *, phase: str = "call") -> CallOutcome:
    """Call a method as the engine process does."""
    return msgspec.msgpack.decode(worker.rollcast_call(method, arguments, phase), type=CallOutcome)


def test_every_attribute_is_new_to_vllms_worker() -> None:
    # vLLM refuses an extension with an attribute that its worker has.
    assert all(name.startswith(("__", "rollcast_")) for name in dir(RollcastWorker))


def test_a_method_is_called_by_name() -> None:
    assert call(Extended(), "divide", [3, 2]) == CallOutcome(result=1.5)
    assert call(Extended(), "plan_bytes", []) == CallOutcome(result=[b"\x00\xff", {1: None}])


@pytest.mark.parametrize(
    ("method", "arguments", "text"),
    [
        ("divide", [3, 0], "division by zero"),
        ("multiply", [], "'Extended' object has no attribute 'multiply'"),
        ("unsendable", [], "Encoding objects of type object is unsupported"),
    ],
)
def test_a_failure_is_a_record_and_not_raised(method: str, arguments: list[Any], text: str) -> None:
    failure = Failure(text=text, worker=3, phase="join")
    assert call(Extended(), method, arguments, phase="join") == CallOutcome(failure=failure)


def test_a_subclass_replaces_what_a_sync_does() -> None:
    worker: Any = Extended()
    assert call(worker, "rollcast_leave", []) == CallOutcome()
    assert worker.rollcast_sync.left == 1 and worker.rollcast_sync is worker.rollcast_sync
