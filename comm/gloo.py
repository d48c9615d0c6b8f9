"""Broadcasts between CPUs over TCP, on a gloo process group of our own (both sides)."""

import threading
import time
from typing import Any

import torch
from torch import distributed as dist

from rollcast.comm.deadline import Deadline

POLL_S = 50e-6


class GlooWork:
    """One gloo broadcast under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    @property
    def done(self) -> bool:
        """Whether nothing is under way any more, for good or ill."""
        return self._work is None or self._work.is_completed()

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`. Polled: gloo's own wait cannot be ended by `GlooGroup.close`."""
        while not self.done:
            deadline.left("a gloo broadcast")
            time.sleep(POLL_S)
        work = self._work
        if work is None:
            raise RuntimeError("the weight group was closed while a gloo broadcast was under way")
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"a gloo broadcast failed: {error}") from None

    def release(self) -> Any:
        """Give up the broadcast: whoever holds it holds the group's sockets open."""
        work, self._work = self._work, None
        return work


class GlooGroup:
    """A `Group` over gloo. The default process group is not touched."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, deadline: Deadline) -> None:
        self.rank = rank
        self.size = size
        # The store must outlive the group: on rank 0 it is the server that the others talk to.
        self._store = store
        self._works: list[GlooWork] = []
        timeout = deadline.left("the gloo group")
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def broadcast(self, tensor: torch.Tensor, *, root: int, deadline: Deadline) -> GlooWork:
        """See `Group.broadcast`."""
        if self._group is None:
            raise RuntimeError("the weight group is closed")
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.timeout = deadline.left("a gloo broadcast")
        work = GlooWork(self._group.broadcast([tensor], options))
        self._works = [*(earlier for earlier in self._works if not earlier.done), work]
        return work

    def close(self) -> None:
        """See `Group.close`."""
        # Dropping the last reference closes the sockets; gloo's own abort() leaves peers waiting. It also waits
        # for broadcasts under way, at worst until their deadline: on a thread, so that the caller does not.
        held = [self._group, *(work.release() for work in self._works)]
        self._group, self._works = None, []
        threading.Thread(target=held.clear, name="gloo-close", daemon=True).start()
