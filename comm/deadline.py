"""One point in time that every wait of one operation shares (both sides)."""

import time
from datetime import timedelta

SPIN_S = 0.02
# The end of a wait is noticed a little late: whoever decodes in the same process needs the interpreter, too.
NAP_S, LONG_NAP_S = 20e-6, 100e-6
NAP_SHARE = 0.02


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


def nap(since_s: float, *, gentle: bool = True) -> None:
    """Between two looks at what is not ready yet, since `since_s` of `time.perf_counter`.

    The longer it takes, the longer. Without `gentle` no sleep at first: waking up costs much more than a look.
    """
    waited_s = time.perf_counter() - since_s
    if not gentle and waited_s < SPIN_S:
        # Other threads of this process may have the interpreter, at least.
        time.sleep(0.0)
    else:
        time.sleep(min(max(NAP_S, waited_s * NAP_SHARE), LONG_NAP_S))
