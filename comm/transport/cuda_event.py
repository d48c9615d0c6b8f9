"""CUDA beyond torch: waiting with a deadline, and memory that other processes can map (both sides)."""

import time
from typing import Protocol

import torch

from rollcast.comm.deadline import Deadline, nap

# How often a wait that has become long asks whether it is in vain.
ASK_S = 0.25


class Leavable(Protocol):
    """A group that ranks can leave."""

    closed: bool
    """Whether this rank has."""
    gentle: bool
    """See `Group`."""

    def left_by(self) -> str | None:
        """Another rank that has left, if any."""
        ...


class EventWork:
    """Copies under way on a stream of ours, until an event."""

    def __init__(self, done: torch.cuda.Event, *, what: str, group: Leavable) -> None:
        self._done = done
        self._what = what
        self._group = group

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. The host waits, with a deadline: only it can tell a slow peer from a lost one."""
        start = asked = time.perf_counter()
        while not self._done.query():
            if self._group.closed:
                raise RuntimeError(f"the weight group was closed while {self._what} was under way")
            if time.perf_counter() - asked > ASK_S:
                if peer := self._group.left_by():
                    raise RuntimeError(f"{peer} left the weight group while {self._what} was under way")
                asked = time.perf_counter()
            deadline.left(self._what)
            nap(start, gentle=self._group.gentle)
