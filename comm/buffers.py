"""Bucket buffers, allocated once and used in turn (both sides)."""

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Work

# One bucket is packed (or applied) while the other is on the wire.
COUNT = 2


class BucketBuffers:
    """`COUNT` uint8 buffers. A buffer is handed out again only after its broadcast is done."""

    def __init__(self, nbytes: int, *, device: torch.device) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(COUNT)]
        self._works: list[Work | None] = [None] * COUNT

    def take(self, turn: int, *, deadline: Deadline) -> torch.Tensor:
        """The buffer of bucket number `turn`, after the broadcast that used it last."""
        self.wait(turn, deadline=deadline)
        return self._buffers[turn % COUNT]

    def put(self, turn: int, work: Work) -> None:
        """Note that bucket number `turn` is on the wire."""
        self._works[turn % COUNT] = work

    def wait(self, turn: int, *, deadline: Deadline) -> None:
        """Wait for the broadcast in the buffer of bucket number `turn`, if there is one."""
        work, self._works[turn % COUNT] = self._works[turn % COUNT], None
        if work is not None:
            work.wait(deadline)

    def forget(self) -> None:
        """Drop broadcasts that failed, so that the buffers can be used again."""
        self._works = [None] * COUNT
