"""What vLLM sees of rollcast in its worker: prefixed methods that never raise, over an object of their own."""

from typing import Any

import msgspec
import pytest

from rollcast.rollout.errors import Failure
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


def test_every_attribute_is_new_to_vllms_worker() -> None:
    # vLLM refuses an extension with an attribute that its worker has.
    assert all(name.startswith(("__", "rollcast_")) for name in dir(RollcastWorker))


def test_a_method_is_called_by_name() -> None:
    assert Extended().rollcast_call("divide", [3, 2]) == [None, 1.5]


@pytest.mark.parametrize(
    ("method", "arguments", "text"),
    [
        ("divide", [3, 0], "division by zero"),
        ("multiply", [], "'Extended' object has no attribute 'multiply'"),
    ],
)
def test_a_failure_is_a_record_and_not_raised(method: str, arguments: list[Any], text: str) -> None:
    failure, result = msgspec.msgpack.decode(msgspec.msgpack.encode(Extended().rollcast_call(method, arguments)))
    assert msgspec.convert(failure, Failure) == Failure(text=text, worker=3, phase=method) and result is None


def test_the_phase_of_a_rollcast_method_has_no_prefix() -> None:
    failure, _ = Extended().rollcast_call("rollcast_prepare", [b""])
    assert failure["phase"] == "prepare"


def test_a_subclass_replaces_what_a_sync_does() -> None:
    worker: Any = Extended()
    assert worker.rollcast_call("rollcast_leave", []) == [None, None]
    assert worker.rollcast_sync.left == 1 and worker.rollcast_sync is worker.rollcast_sync
