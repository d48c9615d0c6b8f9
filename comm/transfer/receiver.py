"""The receiving side of a plan (every vLLM worker)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.comm.device.storage import aligned, flat_bytes
from rollcast.comm.plan.buckets import Message
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.bucket_work import broadcast_bucket
from rollcast.comm.transfer.buffer_ring import DEPTH, BufferRing
from rollcast.comm.transfer.landing import Landing, VerifyError
from rollcast.comm.transport import Group, PersistentTensors, Work

# Most buckets that are received while an engine still reads the live parameters: what the wire carries in the time of
# a decoding step or two.
MAX_PREFETCHED = 4


class WeightReceiver:
    """Receives the buckets of a lane, in place wherever the layouts allow.

        receiver = WeightReceiver(lane, landing, device=device)
        receiver.receive(group, deadline=Deadline(60), timer=PhaseTimer())

    Bucket k + 1 is on its way before bucket k has arrived. Views and buffers are made once and kept.

    `start_prefetch` uses the time in which live parameters are still read: the first buckets are received beside them.
    """

    def __init__(self, lane: Lane, landing: Landing, *, device: torch.device) -> None:
        self.lane = lane
        self._landing = landing
        self.device = device
        self._buckets = [
            [ReceiveSlot(message, landing, device) for message in bucket.messages] for bucket in lane.buckets
        ]
        self._staged = [
            [index for index, slot in enumerate(bucket) if slot.message.stage is not None] for bucket in self._buckets
        ]
        self._ring = BufferRing(max((assign_offsets(bucket) for bucket in self._buckets), default=0), device=device)
        self._bound: dict[int, BoundBucket] = {}
        self._prefetched: list[PrefetchedBucket] = []
        self.prefetch_count = 0
        """Buckets under way since `start_prefetch`."""

    def prepare_prefetch(self, spare_bytes_of: Callable[[torch.device], int]) -> bool:
        """Allocate memory for `start_prefetch`, once, of at most `spare_bytes_of(device)` bytes.

        Returns whether there is memory for any bucket.
        """
        if not self._prefetched:
            spare = spare_bytes_of(self.device)
            buffered = any(not slot.in_place for bucket in self._buckets[:MAX_PREFETCHED] for slot in bucket)
            for number, bucket in enumerate(self._buckets[: DEPTH if buffered else MAX_PREFETCHED]):
                spare -= in_place_bytes(bucket)
                if spare < 0:
                    break
                try:
                    self._prefetched.append(PrefetchedBucket(bucket, self._bind(number).posted))
                except torch.OutOfMemoryError:
                    # Spare memory may be fragmented.
                    break
        return bool(self._prefetched)

    def release(self) -> None:
        """Free the buffers and the memory of prefetched buckets; they are allocated again when they are needed."""
        self._prefetched = []
        self._bound.clear()
        self._ring.free_buffers()

    def start_prefetch(self, group: Group, *, deadline: Deadline) -> None:
        """Start to receive the first buckets that the sender has ready, beside the live parameters.

        Call `prepare_prefetch` before. `receive` continues from there.
        """
        self._ring.reset()
        count = 0
        for bucket in self._prefetched:
            if count and not group.ready():
                break
            bucket.work = broadcast_bucket(group, self.lane, count, bucket.posted, deadline=deadline)
            count += 1
        self.prefetch_count = count

    def receive(
        self,
        group: Group,
        *,
        deadline: Deadline,
        timer: PhaseTimer,
        checksums: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Receive and land every weight once. Collective over the lane.

        With `checksums` the sender's are received too and compared with those of what arrived. Raises
        `VerifyError` naming the first message that differs. `meanwhile` is called when the first bytes are on their
        way.
        """
        prefetched, self.prefetch_count = self.prefetch_count, 0
        if not prefetched:
            self._ring.reset()
        sums: list[torch.Tensor] = []
        try:
            self._landing.begin()
            self._post(0, group, deadline, prefetched)
            for number in range(len(self._buckets)):
                beside = self._prefetched[number] if number < prefetched else None
                with timer("wire"):
                    # Before the wait: the wire must not be idle between two buckets.
                    self._post(number + 1, group, deadline, prefetched)
                    if meanwhile is not None and not number:
                        meanwhile()
                    if beside is not None:
                        beside.wait(deadline)
                    else:
                        self._ring.wait(number, deadline=deadline)
                if checksums:
                    with timer("verify"):
                        sums += map(checksum, (beside or self._bind(number)).posted)
                with timer("apply"):
                    if beside is not None:
                        beside.copy.run()
                    self._apply(number)
            if sums:
                with timer("verify"):
                    self._compare(sums, group, deadline)
            with timer("apply"):
                self._landing.commit()
        except BaseException:
            self._landing.abort()
            raise

    def verify(self, group: Group, *, deadline: Deadline, timer: PhaseTimer) -> None:
        """Receive everything again and compare it with what is in memory. Collective over the lane.

        Live parameters are compared bit for bit; a stage is landed and processed again, which must change
        nothing. Raises `VerifyError` naming the first part that differs.
        """
        with timer("verify"):
            try:
                self._landing.begin(verifying=True)
                for number, (planned, bucket) in enumerate(zip(self.lane.buckets, self._buckets, strict=True)):
                    tensors = [torch.empty(slot.nbytes, dtype=torch.uint8, device=self.device) for slot in bucket]
                    broadcast_bucket(group, self.lane, number, tensors, deadline=deadline).wait(deadline)
                    for slot, tensor in zip(bucket, tensors, strict=True):
                        slot.verify(tensor)
                    for stage in planned.finishes:
                        self._landing.finish(stage)
                self._landing.commit()
            except BaseException:
                self._landing.abort()
                raise

    def _post(self, number: int, group: Group, deadline: Deadline, prefetched: int) -> None:
        """Start to receive bucket number `number`, if there is one and it is not among those `prefetched`."""
        if prefetched <= number < len(self._buckets):
            self._ring.wait(number, deadline=deadline)
            posted = self._bind(number).posted
            self._ring.put(number, broadcast_bucket(group, self.lane, number, posted, deadline=deadline))

    def _bind(self, number: int) -> "BoundBucket":
        """Return the views of a bucket's messages, made at the first call."""
        if number not in self._bound:
            posted, targets, sources = PersistentTensors(), [], []
            for slot in self._buckets[number]:
                posted.append(slot.posted(self._ring, number))
                if slot.copied:
                    targets.append(slot.target())
                    sources.append(slot.typed(posted[-1]))
            self._bound[number] = BoundBucket(posted, targets, sources)
        return self._bound[number]

    def _apply(self, number: int) -> None:
        """Copy what was received into buffers to its targets, and process the stages that this completes."""
        bound = self._bind(number)
        if bound.targets:
            torch._foreach_copy_(bound.targets, bound.sources)
        for index in self._staged[number]:
            slot = self._buckets[number][index]
            slot.target().copy_(slot.typed(bound.posted[index]))
        for stage in self.lane.buckets[number].finishes:
            self._landing.finish(stage)

    def _compare(self, sums: list[torch.Tensor], group: Group, deadline: Deadline) -> None:
        """Receive the sender's checksums and raise `VerifyError` naming the first message whose checksum differs."""
        own = torch.stack(sums)
        expected = torch.empty_like(own)
        group.broadcast([expected.view(torch.uint8)], root=0, deadline=deadline).wait(deadline)
        for index in (own != expected).nonzero().flatten().tolist():
            message = self.lane.messages[index]
            raise VerifyError(f"message {index} of lane {self.lane.index} ({message}): checksum mismatch")


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


class PrefetchedBucket:
    """Memory for a bucket that is received before the live parameters may be written.

    Messages that would be received in place are received into spare memory, and copied from there by `copy`.
    """

    def __init__(self, bucket: Sequence[ReceiveSlot], posted: PersistentTensors) -> None:
        live = [tensor for slot, tensor in zip(bucket, posted, strict=True) if slot.in_place]
        spare = torch.empty(in_place_bytes(bucket), dtype=torch.uint8, device=posted[0].device)
        sizes = [aligned(tensor.numel()) for tensor in live]
        parts = [part[: tensor.numel()] for part, tensor in zip(spare.split(sizes), live, strict=True)]
        in_order = iter(parts)
        pairs = zip(bucket, posted, strict=True)
        self.posted = PersistentTensors(next(in_order) if slot.in_place else tensor for slot, tensor in pairs)
        self.copy = FusedCopy(live, parts)
        self.work: Work | None = None

    def wait(self, deadline: Deadline) -> None:
        """Wait until the bucket has arrived."""
        work, self.work = self.work, None
        assert work is not None
        work.wait(deadline)


def in_place_bytes(bucket: Sequence[ReceiveSlot]) -> int:
    """Return the spare bytes that prefetching the bucket takes."""
    return sum(aligned(slot.nbytes) for slot in bucket if slot.in_place)


def assign_offsets(bucket: Sequence[ReceiveSlot]) -> int:
    """Place every message that is not received in place in the bucket's buffer; return the bytes needed."""
    used = 0
    for slot in bucket:
        if not slot.in_place:
            slot.offset = used
            used = aligned(used + slot.nbytes)
    return used
