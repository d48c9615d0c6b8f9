"""One point in time that every wait of one operation shares (both sides)."""

import time
from datetime import timedelta

SPIN_S, NAP_S = 0.02, 100e-6
# Of an engine that decodes meanwhile, in steps of ten times as long.
GENTLE_NAP_S = 500e-6


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


def nap(since_s: float, *, gentle: bool) -> None:
    """Between two looks at what is not ready yet, since `since_s` of `time.perf_counter`.

    At first without sleep, for waking up takes much longer than a look; `gentle` leaves the interpreter to others.
    """
    if gentle:
        time.sleep(GENTLE_NAP_S)
    elif time.perf_counter() - since_s < SPIN_S:
        time.sleep(0.0)
    else:
        time.sleep(NAP_S)
