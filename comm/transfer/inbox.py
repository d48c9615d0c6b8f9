"""Where what a worker receives goes (worker)."""

from typing import Protocol

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.comm.plan.buckets import Message, aligned
from rollcast.comm.plan.region import flat_bytes
from rollcast.comm.transfer.buffer_ring import Window
from rollcast.comm.transport.base import Parcel, Work


class VerifyError(RuntimeError):
    """What arrived, or what is in memory, is not what was sent."""


class Landing(Protocol):
    """Where a worker's parameters are."""

    def live(self, target: str) -> torch.Tensor:
        """The live tensor that the moves without a stage write. Asked for once."""
        ...

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """The tensor that a stage's moves write. Valid until `finish(stage)`."""
        ...

    def begin(self, *, confirming: bool = False) -> None:
        """A sync starts: the parameters may be written from now on.

        When `confirming`, the weights are those that are there: a stage whose outcome changes raises `VerifyError`.
        """
        ...

    def finish(self, stage: int) -> None:
        """All moves of a stage have arrived: process its module."""
        ...

    def commit(self) -> None:
        """Everything has arrived: finish whatever needs all of it."""
        ...

    def abandon(self) -> None:
        """The sync failed: drop what is unfinished."""
        ...


class Inbox:
    """Where one message goes."""

    def __init__(self, message: Message, landing: Landing, device: torch.device) -> None:
        self.message = message
        self.nbytes = message.nbytes
        self.offset = 0
        self._landing = landing
        self._live = landing.live(message.target) if message.stage is None else None
        # A tensor that vLLM keeps elsewhere (on the host, say) cannot be received into.
        self.in_place = message.in_place and self._live is not None and self._live.device.type == device.type
        self.copied = message.stage is None and not self.in_place

    def posted(self, window: Window, turn: int) -> torch.Tensor:
        """The bytes to receive into."""
        if self.in_place:
            assert self._live is not None
            return self.message.region.bytes_of(self._live)
        return window.buffer(turn)[self.offset : self.offset + self.nbytes]

    def target(self) -> torch.Tensor:
        """What is written in the end."""
        stage = self.message.stage
        tensor = self._landing.staging(stage, self.message.target) if stage is not None else self._live
        assert tensor is not None
        return self.message.region.view(tensor)

    def typed(self, data: torch.Tensor) -> torch.Tensor:
        """Received bytes as the wire's dtype, in the target's shape."""
        return data.view(self.message.dtype).view(self.message.region.shape)

    def confirm(self, data: torch.Tensor) -> None:
        """Compare received bytes with the target, or stage them."""
        target = self.target()
        sent = self.typed(data).to(target.device)
        if self.message.stage is not None:
            target.copy_(sent)
        elif not torch.equal(flat_bytes(sent.to(target.dtype)), flat_bytes(target)):
            raise VerifyError(f"{self.message} in memory is not what the trainer holds")


class Ahead:
    """A bucket's way past the live parameters."""

    def __init__(self, bucket: list[Inbox], tensors: list[torch.Tensor]) -> None:
        live = [tensor for box, tensor in zip(bucket, tensors, strict=True) if box.in_place]
        spare = torch.empty(spare_bytes(bucket), dtype=torch.uint8, device=tensors[0].device)
        sizes = [aligned(tensor.numel()) for tensor in live]
        rooms = [room[: tensor.numel()] for room, tensor in zip(spare.split(sizes), live, strict=True)]
        places = iter(rooms)
        pairs = zip(bucket, tensors, strict=True)
        self.posted = Parcel(next(places) if box.in_place else tensor for box, tensor in pairs)
        self.copy = FusedCopy(live, rooms)
        self.work: Work | None = None

    def wait(self, deadline: Deadline) -> None:
        """Until the bucket has arrived beside the live parameters."""
        work, self.work = self.work, None
        assert work is not None
        work.wait(deadline)


def spare_bytes(bucket: list[Inbox]) -> int:
    return sum(aligned(box.nbytes) for box in bucket if box.in_place)


def lay_out(bucket: list[Inbox]) -> int:
    """Give every message that is not received in place its own room in the buffer; return the bytes needed."""
    used = 0
    for box in bucket:
        if not box.in_place:
            box.offset = used
            used = aligned(used + box.nbytes)
    return used
