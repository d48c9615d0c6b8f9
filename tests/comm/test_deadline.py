"""A deadline is positive, and a wait that it ends names what was waited for."""

import time

import pytest

from rollcast.comm import Deadline


@pytest.mark.parametrize("timeout_s", [0, -1.5])
def test_a_deadline_must_be_positive(timeout_s: float) -> None:
    with pytest.raises(ValueError, match=f"positive, got {timeout_s}"):
        Deadline(timeout_s)


def test_a_deadline_names_what_was_waited_for() -> None:
    deadline = Deadline(0.05)
    assert 0 < deadline.left("nothing").total_seconds() <= 0.05
    time.sleep(0.06)
    assert deadline.left_s() == 0.0
    with pytest.raises(TimeoutError, match=r"wait for the engines: the deadline was 0\.05 s"):
        deadline.left("the engines")
