"""Broadcasts between CPUs over TCP, on a gloo process group of our own (both sides)."""

from typing import Any

import torch
from torch import distributed as dist

from rollcast.comm.deadline import Deadline


class GlooWork:
    """One gloo broadcast under way."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`."""
        try:
            self._work.wait(deadline.left("a gloo broadcast"))
        except RuntimeError as error:
            raise RuntimeError(f"a gloo broadcast failed (deadline {deadline.timeout_s:g} s): {error}") from error


class GlooGroup:
    """A `Group` over gloo. The default process group is not touched."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, deadline: Deadline) -> None:
        self.rank = rank
        self.size = size
        # The store must outlive the group: on rank 0 it is the server that the others talk to.
        self._store = store
        timeout = deadline.left("the gloo group")
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def broadcast(self, tensor: torch.Tensor, *, root: int, deadline: Deadline) -> GlooWork:
        """See `Group.broadcast`."""
        if self._group is None:
            raise RuntimeError("the weight group is closed")
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.timeout = deadline.left("a gloo broadcast")
        return GlooWork(self._group.broadcast([tensor], options))

    def close(self) -> None:
        """See `Group.close`."""
        # Dropping the last reference closes the sockets; gloo's own abort() leaves peers waiting.
        self._group = None
