"""The receiving side of one lane: where each message of each bucket is received, and where it goes (vLLM workers)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.storage import aligned, flat_bytes
from rollcast.comm.plan.buckets import Message
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.transfer.bucket_work import broadcast_bucket
from rollcast.comm.transfer.buffer_ring import BufferRing
from rollcast.comm.transfer.landing import Landing, VerifyError
from rollcast.comm.transport import Group, PersistentTensors


class LaneReceiver:
    """One lane of a worker: what is received from one trainer rank, and where it goes."""

    def __init__(self, lane: Lane, landing: Landing, device: torch.device) -> None:
        self.index = lane.index
        self.planned = lane
        self.slots = [[ReceiveSlot(message, landing, device) for message in bucket.messages] for bucket in lane.buckets]
        self._staged = [
            [index for index, slot in enumerate(bucket) if slot.message.stage is not None] for bucket in self.slots
        ]
        self.ring = BufferRing(max((assign_offsets(bucket) for bucket in self.slots), default=0), device=device)
        self._device = device
        self._bound: dict[int, BoundBucket] = {}

    def release(self) -> None:
        """Free the buffers."""
        self._bound.clear()
        self.ring.free_buffers()

    def post(self, number: int, group: Group, deadline: Deadline) -> None:
        """Start to receive a bucket."""
        self.ring.wait(number, deadline=deadline)
        posted = self.bind(number).posted
        self.ring.put(number, broadcast_bucket(group, self.planned, number, posted, deadline=deadline))

    def wait(self, number: int, deadline: Deadline) -> None:
        """Wait until a bucket has arrived."""
        self.ring.wait(number, deadline=deadline)

    def bind(self, number: int) -> "BoundBucket":
        """Return the views of a bucket's messages, made at the first call."""
        if number not in self._bound:
            posted, targets, sources = PersistentTensors(), [], []
            for slot in self.slots[number]:
                posted.append(slot.posted(self.ring, number))
                if slot.copied:
                    targets.append(slot.target())
                    sources.append(slot.typed(posted[-1]))
            self._bound[number] = BoundBucket(posted, targets, sources)
        return self._bound[number]

    def apply(self, number: int) -> None:
        """Copy what was received into buffers to its targets."""
        bound = self.bind(number)
        if bound.targets:
            torch._foreach_copy_(bound.targets, bound.sources)
        for index in self._staged[number]:
            slot = self.slots[number][index]
            slot.target().copy_(slot.typed(bound.posted[index]))

    def verify(self, number: int, group: Group, deadline: Deadline) -> None:
        """Receive a bucket again; compare it with live targets, or land it in the stages' tensors."""
        slots = self.slots[number]
        tensors = [torch.empty(slot.nbytes, dtype=torch.uint8, device=self._device) for slot in slots]
        broadcast_bucket(group, self.planned, number, tensors, deadline=deadline).wait(deadline)
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.verify(tensor)

    def compare(self, sums: list[torch.Tensor], group: Group, deadline: Deadline) -> None:
        """Receive the sender's checksums and raise `VerifyError` naming the first message whose checksum differs."""
        if not sums:
            return
        own = torch.stack(sums)
        expected = torch.empty_like(own)
        group.broadcast([expected.view(torch.uint8)], root=0, deadline=deadline).wait(deadline)
        for index in (own != expected).nonzero().flatten().tolist():
            message = self.planned.messages[index]
            raise VerifyError(f"message {index} of lane {self.index} ({message}): checksum mismatch")


class ReceiveSlot:
    """Where one message is received, and where it goes from there."""

    def __init__(self, message: Message, landing: Landing, device: torch.device) -> None:
        self.message = message
        self.nbytes = message.nbytes
        self.offset = 0
        """First byte in the bucket's buffer, if it is not received in place."""
        self._landing = landing
        self._live = landing.live(message.target) if message.stage is None else None
        # A tensor that vLLM keeps on another device (on the host, say) cannot be received into.
        self.in_place = message.in_place and self._live is not None and self._live.device.type == device.type
        self.copied = message.stage is None and not self.in_place

    def posted(self, ring: BufferRing, number: int) -> torch.Tensor:
        """Return the bytes (flat uint8) to receive into, for a message of bucket number `number`."""
        if self.in_place:
            assert self._live is not None
            return self.message.region.bytes_of(self._live)
        return ring.buffer(number)[self.offset : self.offset + self.nbytes]

    def target(self) -> torch.Tensor:
        """Return the part of a live or staging tensor that the message is for."""
        stage = self.message.stage
        tensor = self._landing.staging(stage, self.message.target) if stage is not None else self._live
        assert tensor is not None
        return self.message.region.view(tensor)

    def typed(self, data: torch.Tensor) -> torch.Tensor:
        """View received bytes in the wire dtype and the target's shape."""
        return data.view(self.message.dtype).view(self.message.region.shape)

    def verify(self, data: torch.Tensor) -> None:
        """Compare received bytes with the live target, or write them to the staging tensor."""
        target = self.target()
        sent = self.typed(data).to(target.device)
        if self.message.stage is not None:
            target.copy_(sent)
        elif not torch.equal(flat_bytes(sent.to(target.dtype)), flat_bytes(target)):
            raise VerifyError(f"{self.message} in memory is not what the trainer holds")


@dataclass(frozen=True, slots=True)
class BoundBucket:
    """A bucket's views of buffers and live parameters, the same at every sync."""

    posted: PersistentTensors
    """The bytes that each message is received into."""
    targets: list[torch.Tensor]
    """Parts of live parameters that are copied from `sources`."""
    sources: list[torch.Tensor]
    """Received buffers, in wire dtype and the targets' shapes."""


def assign_offsets(bucket: Sequence[ReceiveSlot]) -> int:
    """Place every message that is not received in place in the bucket's buffer; return the bytes needed."""
    used = 0
    for slot in bucket:
        if not slot.in_place:
            slot.offset = used
            used = aligned(used + slot.nbytes)
    return used
