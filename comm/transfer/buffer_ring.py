"""A lane's bucket buffers, and the broadcasts that use them, at most two at a time (both sides)."""

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.transport import Work

# One bucket is packed (or applied) while the other is on the wire.
DEPTH = 2


class BufferRing:
    """Buffers, allocated once and used in turn, and the broadcasts that use them.

    The memory of a bucket (its buffer, and the tensors that are sent without a copy) may be reused only after the
    bucket's broadcast is done.
    """

    def __init__(self, buffer_bytes: int, *, device: torch.device) -> None:
        self._nbytes = buffer_bytes
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._works: list[Work | None] = [None] * DEPTH
        self._keep_alive: list[object] = [None] * DEPTH

    def buffer(self, bucket: int) -> torch.Tensor:
        """Return the buffer (flat uint8) of bucket number `bucket`.

        The first call allocates the buffers: not every lane needs any.
        """
        if not self._buffers:
            self._buffers = [torch.empty(self._nbytes, dtype=torch.uint8, device=self._device) for _ in range(DEPTH)]
        return self._buffers[bucket % DEPTH]

    def wait(self, bucket: int, *, deadline: Deadline) -> None:
        """Wait for the broadcast that uses the buffer of bucket number `bucket`, if there is one."""
        slot = bucket % DEPTH
        work, self._works[slot] = self._works[slot], None
        if work is not None:
            work.wait(deadline)
        self._keep_alive[slot] = None

    def put(self, bucket: int, work: Work, *, keep_alive: object = None) -> None:
        """Record the broadcast of bucket number `bucket`; `keep_alive` is referenced until it is done."""
        self._works[bucket % DEPTH] = work
        self._keep_alive[bucket % DEPTH] = keep_alive

    def wait_all(self, *, deadline: Deadline) -> None:
        """Wait for every recorded broadcast."""
        for bucket in range(DEPTH):
            self.wait(bucket, deadline=deadline)

    def free_buffers(self) -> None:
        """Free the buffers; the next `buffer` allocates them again. No broadcast may be under way."""
        self._buffers = []

    def reset(self) -> None:
        """Drop the broadcasts of a sync that failed, so that the buffers can be used again."""
        self._works, self._keep_alive = [None] * DEPTH, [None] * DEPTH
