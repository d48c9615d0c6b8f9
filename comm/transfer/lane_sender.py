"""The sending side of one lane: pack weights into buckets and broadcast them (trainer)."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import StorageSnapshot, aligned
from rollcast.comm.plan.buckets import Message
from rollcast.comm.plan.region import Region
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.bucket_work import BucketWork, broadcast_bucket
from rollcast.comm.transfer.buffer_ring import BufferRing
from rollcast.comm.transport import Group, PersistentTensors

Formats = Sequence[tuple[torch.dtype, str]]
"""Dtype and device type of each parameter at the trainer."""
EMPTY = torch.empty(0, dtype=torch.uint8)
# Most unacknowledged broadcasts that use no buffer: bounds how far a lane runs ahead of a receiver that died.
MAX_UNACKNOWLEDGED = 8


@dataclass(slots=True)
class OutgoingBucket:
    """One bucket, ready to be packed and sent."""

    lane: int
    """Index of its lane."""
    number: int
    """Position among the lane's buckets."""
    tensors: PersistentTensors
    """The bytes of each message: the trainer's own memory, or a part of the bucket's buffer."""
    params: list[int] = field(default_factory=list)
    """Parameters that it has parts of."""
    snapshot: StorageSnapshot | None = None
    """Storage of these parameters, if it stays the same from sync to sync. None: the tensors are made for this sync
    and freed when they are sent."""
    buffer_views: list[torch.Tensor] = field(default_factory=list)
    packed: list[torch.Tensor] = field(default_factory=list)
    """Parts of parameters that are copied (and cast) into `buffer_views` before the bucket is sent."""

    def is_valid(self) -> bool:
        """Return whether the parameters are still in the memory that they were in when this was made."""
        return self.snapshot is not None and self.snapshot.unchanged()


@dataclass(frozen=True, slots=True)
class _MessagePart:
    """A part of one parameter, and where it goes."""

    message: int
    """Index in its bucket."""
    offset: int | None
    """First byte in the bucket's buffer. None: sent from the trainer's memory, as a message of its own."""
    source: Region
    completes_bucket: bool


class LaneSender:
    """One lane: which parts of each parameter it needs, and the buckets of a sync that are on the wire.

    A sync is `begin`, `add` for every parameter (or the buckets of an earlier sync), `send` for every bucket, `finish`.
    """

    def __init__(self, lane: Lane, formats: Formats, device: torch.device) -> None:
        self.index = lane.index
        self._lane = lane
        self._buckets = lane.buckets
        self._parts: dict[int, list[_MessagePart]] = defaultdict(list)
        # For each bucket: index of a message that is packed -> its first byte in the buffer.
        self._offsets: list[dict[int, int]] = []
        used = [self._assign_offsets(number, formats, device.type) for number in range(len(lane.buckets))]
        self.ring = BufferRing(max(used), device=device)
        self._works: deque[BucketWork] = deque()
        self._open: OutgoingBucket | None = None

    def _assign_offsets(self, number: int, formats: Formats, device: str) -> int:
        """Place every message that must be packed in the bucket's buffer; return the bytes needed."""
        used = 0
        offsets: dict[int, int] = {}
        messages = self._buckets[number].messages
        for index, message in enumerate(messages):
            if not _is_sendable(message, formats, device):
                offsets[index] = used = aligned(used)
                used += message.nbytes
            offset = offsets.get(index)
            for position, (param, source) in enumerate(message.pieces, start=1):
                last = (index, position) == (len(messages) - 1, len(message.pieces))
                self._parts[param].append(_MessagePart(index, offset, source, last))
                offset = offset + source.nbytes if offset is not None else None
        self._offsets.append(offsets)
        return used

    def begin(self, group: Group, deadline: Deadline, timer: PhaseTimer, *, checksums: bool) -> None:
        """Begin a sync over `group`, of which this rank is rank 0."""
        self._group, self._deadline, self._timer = group, deadline, timer
        self._sums: list[torch.Tensor] | None = [] if checksums else None
        self._next, self._sent = 0, 0
        self._open = None
        self._works.clear()
        self.ring.reset()

    def add(self, param: int, tensor: torch.Tensor) -> Iterator[OutgoingBucket]:
        """Take the parts that the lane needs of a full tensor; yield every bucket that they complete."""
        pieces = self._parts.get(param, ())
        if pieces and not tensor.is_contiguous():
            tensor = tensor.contiguous()
        for piece in pieces:
            bucket = self._open = self._open or self._next_bucket()
            if bucket.params[-1:] != [param]:
                bucket.params.append(param)
            source = piece.source
            if piece.offset is None:
                bucket.tensors[piece.message] = source.bytes_of(tensor)
            else:
                part = self.ring.buffer(bucket.number)[piece.offset : piece.offset + source.nbytes]
                bucket.buffer_views.append(part.view(source.dtype).view(source.shape))
                offset = tensor.storage_offset() + source.offset
                bucket.packed.append(tensor.as_strided(source.shape, source.stride, offset))
            if piece.completes_bucket:
                # At once: workers that process a stage together may wait for this bucket on another lane.
                self._open = None
                yield bucket

    def send(self, bucket: OutgoingBucket) -> None:
        """Pack the bucket and start its broadcast."""
        in_ring = bool(bucket.buffer_views) or bucket.snapshot is None
        with self._timer("wire"):
            # The buffer is free once the broadcast that used it last is done.
            if in_ring:
                self.ring.wait(bucket.number, deadline=self._deadline)
        with self._timer("pack"):
            if bucket.buffer_views:
                torch._foreach_copy_(bucket.buffer_views, bucket.packed)
        if self._sums is not None:
            with self._timer("verify"):
                self._sums += [checksum(tensor) for tensor in bucket.tensors]
        with self._timer("wire"):
            work = broadcast_bucket(self._group, self._lane, bucket.number, bucket.tensors, deadline=self._deadline)
            if in_ring:
                self.ring.put(bucket.number, work, keep_alive=bucket)
            else:
                self._works.append(work)
                if len(self._works) > MAX_UNACKNOWLEDGED:
                    self._works.popleft().wait(self._deadline)
        self._sent += 1

    def finish(self) -> None:
        """Wait until every bucket has been received, then send the checksums if they were asked for."""
        assert self._sent == len(self._buckets)
        with self._timer("wire"):
            for work in self._works:
                work.wait(self._deadline)
            self.ring.wait_all(deadline=self._deadline)
            if self._sums:
                sums = torch.stack(self._sums).view(torch.uint8)
                self._group.broadcast([sums], root=0, deadline=self._deadline).wait(self._deadline)

    def _next_bucket(self) -> OutgoingBucket:
        """Start the next bucket, with views of its buffer for the messages that are packed."""
        number, self._next = self._next, self._next + 1
        messages = self._buckets[number].messages
        tensors = PersistentTensors([EMPTY] * len(messages))
        for index, offset in self._offsets[number].items():
            tensors[index] = self.ring.buffer(number)[offset : offset + messages[index].nbytes]
        return OutgoingBucket(self.index, number, tensors)


def _is_sendable(message: Message, formats: Formats, device: str) -> bool:
    """Return whether the message can be sent from the trainer's memory, without a copy."""
    (param, source), *others = message.pieces
    return not others and source.is_contiguous and formats[param] == (source.dtype, device)
