"""Broadcasts between CPUs over TCP, on a gloo process group of our own (both sides)."""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from rollcast.comm.deadline import Deadline

POLL_S = 50e-6
# gloo's own timeout ends after the deadline, whose error names what was waited for.
MARGIN = timedelta(seconds=1)


class GlooWork:
    """One grouped gloo broadcast under way."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works
        self._problem: str | None = None

    @property
    def under_way(self) -> bool:
        """Whether gloo still reads or writes a tensor."""
        return any(not work.is_completed() for work in self._works)

    @property
    def detached(self) -> bool:
        """Whether this no longer holds the group's sockets open."""
        return not self._works

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. Polled: gloo's own wait cannot be ended by `GlooGroup.close`."""
        while self.under_way:
            deadline.left("a gloo broadcast")
            time.sleep(POLL_S)
        self._collect_outcomes()
        if self._problem:
            raise RuntimeError(self._problem)

    def detach(self) -> list[Any]:
        """Fail this broadcast, if it is not over, and return the objects that hold the group's sockets open."""
        works, self._works = self._works, []
        if works:
            self._problem = "the weight group was closed while a gloo broadcast was under way"
        return works

    def _collect_outcomes(self) -> None:
        works, self._works = self._works, []
        for work in works:
            self._problem = self._problem or _outcome(work)


# These two functions return the error as text: a traceback through them would keep the group's sockets open.


def _start(group: Any, tensors: Sequence[torch.Tensor], options: Any) -> list[Any] | str:
    """Return the broadcasts that are under way, or the error that kept them from starting."""
    if group is None:
        return "the weight group is closed"
    try:
        return [group.broadcast([tensor], options) for tensor in tensors]
    except RuntimeError as error:
        return f"a gloo broadcast failed: {error}"


def _outcome(work: Any) -> str | None:
    """Return the error of a broadcast that is over, if it failed."""
    try:
        work.wait()
    except RuntimeError as error:
        return f"a gloo broadcast failed: {error}"
    return None


class GlooGroup:
    """A `Group` over gloo. The default process group is not touched."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, deadline: Deadline) -> None:
        self.rank = rank
        self.size = size
        self.low_priority = False
        # The store must outlive the group: on its host it is the server that the others connect to.
        self._store = store
        self._works: list[GlooWork] = []
        timeout = deadline.left("the gloo group")
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> GlooWork:
        """See `Group.broadcast`."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.timeout = deadline.left("a gloo broadcast") + MARGIN
        started = _start(self._group, tensors, options)
        if isinstance(started, str):
            raise RuntimeError(started)
        work = GlooWork(started)
        self._works = [*(earlier for earlier in self._works if not earlier.detached), work]
        if self._group is None:
            # Another thread closed the group in the meantime and did not see this broadcast.
            self.close()
        return work

    def ready(self) -> bool:
        """See `Group.ready`."""
        return True

    def unmap(self) -> None:
        """See `Group.unmap`."""

    def close(self) -> None:
        """See `Group.close`."""
        under_way = any(work.under_way for work in self._works)
        held = [self._group, *(work.detach() for work in self._works)]
        self._group, self._works = None, []
        # Dropping the last reference closes the sockets; gloo's own abort() leaves peers waiting.
        if under_way:
            # That also waits for the broadcasts under way, at worst until their deadline, so a thread does it for
            # the caller. Not a daemon thread: a process that exits in the middle of it aborts.
            threading.Thread(target=held.clear, name="gloo-close").start()
        else:
            held.clear()
