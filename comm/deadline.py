"""One point in time that every wait of one operation shares (both sides)."""

import time
from datetime import timedelta


class Deadline:
    """A moment `timeout_s` seconds from now. Monotonic, so clock changes do not matter."""

    def __init__(self, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def left(self, waiting_for: str) -> timedelta:
        """Time left for the next wait. Raises `TimeoutError` that names what was waited for when none is."""
        left_s = self.left_s()
        if left_s == 0.0:
            raise TimeoutError(f"no time left to wait for {waiting_for}: the deadline was {self.timeout_s:g} s")
        return timedelta(seconds=max(left_s, 0.001))
