"""Buckets on the wire, at most two at a time (both sides)."""

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.transport.base import Work

# One bucket is packed (or applied) while the other is on the wire.
DEPTH = 2


class Window:
    """Buffers, made once and used in turn, and the broadcasts that use them.

    What belongs to a bucket may be reused, its buffer and the tensors sent from where they are, only after the
    bucket's broadcast is done.
    """

    def __init__(self, buffer_bytes: int, *, device: torch.device) -> None:
        self._nbytes = buffer_bytes
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._works: list[Work | None] = [None] * DEPTH
        self._held: list[object] = [None] * DEPTH

    def buffer(self, turn: int) -> torch.Tensor:
        """The buffer of bucket number `turn`. The first call makes the buffers: not every lane needs any."""
        if not self._buffers:
            self._buffers = [torch.empty(self._nbytes, dtype=torch.uint8, device=self._device) for _ in range(DEPTH)]
        return self._buffers[turn % DEPTH]

    def wait(self, turn: int, *, deadline: Deadline) -> None:
        """Wait for the broadcast that uses the buffer of bucket number `turn`, if there is one."""
        slot = turn % DEPTH
        work, self._works[slot] = self._works[slot], None
        if work is not None:
            work.wait(deadline)
        self._held[slot] = None

    def put(self, turn: int, work: Work, *, held: object = None) -> None:
        """Note that bucket number `turn` is on the wire; `held` is kept alive until it is done."""
        self._works[turn % DEPTH] = work
        self._held[turn % DEPTH] = held

    def drain(self, *, deadline: Deadline) -> None:
        """Wait for everything."""
        for turn in range(DEPTH):
            self.wait(turn, deadline=deadline)

    def release(self) -> None:
        """Give the buffers back. Nothing may be on the wire."""
        self._buffers = []

    def forget(self) -> None:
        """Drop broadcasts that failed, so that the buffers can be used again."""
        self._works, self._held = [None] * DEPTH, [None] * DEPTH
