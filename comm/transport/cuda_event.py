"""Wait for copies on a CUDA stream, with a deadline and an eye on the peers (both sides; NCCL and CUDA IPC)."""

import time
from typing import Protocol

import torch

from rollcast.comm.deadline import Deadline, poll_sleep

# How often a long wait checks whether a peer has left the group.
PEER_CHECK_S = 0.25


class LeavableGroup(Protocol):
    """The state of a group that `EventWork` watches while it waits."""

    closed: bool
    """Whether this rank has left."""
    low_priority: bool
    """See `Group`."""

    def departed_peer(self) -> str | None:
        """Return the name of another rank that has left, if any has."""
        ...


class EventWork:
    """Copies on a stream of the group's own, up to an event."""

    def __init__(self, done: torch.cuda.Event, *, what: str, group: LeavableGroup) -> None:
        self._done = done
        self._what = what
        self._group = group

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. The host waits, not a stream: only the host can check the deadline and the peers."""
        start = checked = time.perf_counter()
        while not self._done.query():
            if self._group.closed:
                raise RuntimeError(f"the weight group was closed while {self._what} was under way")
            if time.perf_counter() - checked > PEER_CHECK_S:
                if peer := self._group.departed_peer():
                    raise RuntimeError(f"{peer} left the weight group while {self._what} was under way")
                checked = time.perf_counter()
            deadline.left(self._what)
            poll_sleep(start, low_priority=self._group.low_priority)
