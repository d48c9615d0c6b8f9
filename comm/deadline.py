"""A point in time that all waits of one operation share, and the pause between two polls (every process)."""

import time
from datetime import timedelta

# A poll that has waited for less than this only yields the interpreter: waking from a sleep takes longer than a poll.
SPIN_S = 0.02
POLL_S = 100e-6
LOW_PRIORITY_POLL_S = 500e-6


class Deadline:
    """A moment `timeout_s` seconds from now, on the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        """Raise `ValueError` unless `timeout_s` is positive."""
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def left(self, waiting_for: str) -> timedelta:
        """Return the time left for the next wait. Raise `TimeoutError` naming `waiting_for` when there is none."""
        left_s = self.left_s()
        if left_s == 0.0:
            raise TimeoutError(f"no time left to wait for {waiting_for}: the deadline was {self.timeout_s:g} s")
        return timedelta(seconds=max(left_s, 0.001))


def poll_sleep(since_s: float, *, low_priority: bool) -> None:
    """Pause between two polls of a wait that began at `since_s` (of `time.perf_counter`).

    With `low_priority` every pause is a real sleep, which leaves the interpreter to an engine that decodes in this
    process in steps of some milliseconds.
    """
    if low_priority:
        time.sleep(LOW_PRIORITY_POLL_S)
    elif time.perf_counter() - since_s < SPIN_S:
        time.sleep(0.0)
    else:
        time.sleep(POLL_S)
