"""The sending side of one lane: pack weights into buckets and broadcast them (trainer)."""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import StorageSnapshot, aligned
from rollcast.comm.plan.box import localize
from rollcast.comm.plan.buckets import Message
from rollcast.comm.plan.region import Region
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.bucket_work import BucketWork, broadcast_bucket
from rollcast.comm.transfer.buffer_ring import BufferRing
from rollcast.comm.transfer.source import LocalFormat
from rollcast.comm.transport import Group, PersistentTensors

Formats = Sequence[Sequence[LocalFormat]]
"""How this rank's tensors of each parameter of its source are in memory."""
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
    """A part of one tensor of this rank, and where it goes."""

    message: int
    """Index in its bucket."""
    offset: int | None
    """First byte in the bucket's buffer of what `place` is a region of. None: sent from the trainer's memory."""
    tensor: int
    """Which of this rank's tensors of the parameter."""
    local: Region
    """Part of that tensor."""
    place: Region
    """The same elements on the wire, as a region of a contiguous tensor."""
    completes_bucket: bool


class LaneSender:
    """One lane: which parts of each parameter it needs, and the buckets of a sync that are on the wire.

    A sync is `begin`, `add` for every parameter (or the buckets of an earlier sync), `send` for every bucket, `finish`.
    """

    def __init__(self, lane: Lane, formats: Formats, device: torch.device, *, own: Mapping[int, int]) -> None:
        """`own` maps the plan's parameters to those of this rank's source, which `formats` are of."""
        self.index = lane.index
        self._lane = lane
        self._buckets = lane.buckets
        self._own = own
        self._parts: dict[int, list[_MessagePart]] = defaultdict(list)
        # For each bucket: index of a message that is packed -> its first byte in the buffer.
        self._offsets: list[dict[int, int]] = []
        used = [self._assign_offsets(number, formats, device.type) for number in range(len(lane.buckets))]
        self.ring = BufferRing(max(used, default=0), device=device)
        self._works: deque[BucketWork] = deque()
        self._open: OutgoingBucket | None = None

    def _assign_offsets(self, number: int, formats: Formats, device: str) -> int:
        """Place every message that must be packed in the bucket's buffer; return the bytes needed."""
        used = 0
        offsets: dict[int, int] = {}
        last: tuple[int, int] | None = None
        for index, message in enumerate(self._buckets[number].messages):
            parts = [self._local_parts(param, source, formats) for param, source in message.pieces]
            held = formats[self._own[message.pieces[0][0]]][parts[0][0][0]]
            if not _is_sendable(message, parts, held, device):
                offsets[index] = used = aligned(used)
                used += message.nbytes
            offset = offsets.get(index)
            for (param, source), of_piece in zip(message.pieces, parts, strict=True):
                own = self._own[param]
                for tensor, local, place in of_piece:
                    self._parts[own].append(_MessagePart(index, offset, tensor, local, place, completes_bucket=False))
                last = own, len(self._parts[own]) - 1
                offset = offset + source.nbytes if offset is not None else None
        if last is not None:
            own, position = last
            self._parts[own][position] = replace(self._parts[own][position], completes_bucket=True)
        self._offsets.append(offsets)
        return used

    def _local_parts(self, param: int, source: Region, formats: Formats) -> list[tuple[int, Region, Region]]:
        """Return (tensor, part of it, place on the wire) of a region of the full parameter, which this rank holds."""
        of_param = formats[self._own[param]]
        last = source.offset + sum((size - 1) * step for size, step in zip(source.shape, source.stride, strict=True))
        # Both ends: boxes of one rank may overlap.
        inside = [index for index, each in enumerate(of_param) if each.box.has(source.offset) and each.box.has(last)]
        tensor = inside[0]
        held = of_param[tensor]
        return [(tensor, *both) for both in localize(source, held.box, held.strides)]

    def begin(self, group: Group, deadline: Deadline, timer: PhaseTimer, *, checksums: bool) -> None:
        """Begin a sync over `group`, of which this rank is rank 0."""
        self._group, self._deadline, self._timer = group, deadline, timer
        self._sums: list[torch.Tensor] | None = [] if checksums else None
        self._next, self._sent = 0, 0
        self._open = None
        self._works.clear()
        self.ring.reset()

    def add(self, param: int, tensors: Sequence[torch.Tensor]) -> Iterator[OutgoingBucket]:
        """Take the parts that the lane needs of the source's parameter; yield every bucket that they complete."""
        for piece in self._parts.get(param, ()):
            bucket = self._open = self._open or self._next_bucket()
            if bucket.params[-1:] != [param]:
                bucket.params.append(param)
            tensor, local, place = tensors[piece.tensor], piece.local, piece.place
            if piece.offset is None:
                bucket.tensors[piece.message] = local.bytes_of(tensor)
            else:
                buffer = self.ring.buffer(bucket.number)[piece.offset :]
                whole = buffer[: buffer.numel() // place.dtype.itemsize * place.dtype.itemsize].view(place.dtype)
                bucket.buffer_views.append(place.view(whole))
                offset = tensor.storage_offset() + local.offset
                bucket.packed.append(tensor.as_strided(local.shape, local.stride, offset))
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
            # Nothing of the trainer's memory is kept between syncs.
            self._works.clear()
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


def _is_sendable(
    message: Message, parts: Sequence[Sequence[tuple[int, Region, Region]]], held: LocalFormat, device: str
) -> bool:
    """Return whether the message can be sent from the trainer's memory, without a copy."""
    if [len(of_piece) for of_piece in parts] != [1]:
        return False
    ((_, local, place),) = parts[0]
    return local.is_contiguous and place.is_contiguous and (held.dtype, held.device) == (message.dtype, device)
