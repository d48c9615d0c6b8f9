"""What one lane has on its way out (trainer)."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.storage import Spots, aligned
from rollcast.comm.plan.buckets import Message
from rollcast.comm.plan.region import Region
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.buffer_ring import Window
from rollcast.comm.transport.base import Group, Parcel, Work

Formats = Sequence[tuple[torch.dtype, str]]
"""Dtype and kind of device of each parameter, as the trainer has it."""
NOTHING = torch.empty(0, dtype=torch.uint8)
# More is not on the wire at a time. A receiver that has stopped must be noticed, not written to.
MOST_UNANSWERED = 8


@dataclass(slots=True)
class Load:
    """One bucket on its way out."""

    lane: int
    turn: int
    tensors: Parcel
    """Of each message: the bytes to send, from where they are or in the bucket's buffer."""
    params: list[int] = field(default_factory=list)
    """What it has parts of."""
    spots: Spots | None = None
    """Where the weights are, if they stay there. Else they are let go when they are sent."""
    rooms: list[torch.Tensor] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    """What is copied into `rooms`, views of the buffer, before."""

    def holds(self) -> bool:
        """Whether the weights still are where they were when it was made."""
        return self.spots is not None and self.spots.unchanged()


@dataclass(frozen=True, slots=True)
class _Piece:
    message: int
    """Index in its bucket."""
    room: int | None
    """First byte in the bucket's buffer. None: sent from where it is, as a message of its own."""
    source: Region
    last: bool
    """Whether it completes its bucket."""


class Outbox:
    """One lane: what it needs of each parameter and where that goes; in a sync, its buckets on the wire."""

    def __init__(self, lane: Lane, formats: Formats, device: torch.device) -> None:
        self.index = lane.index
        self._buckets = lane.buckets
        self._pieces: dict[int, list[_Piece]] = defaultdict(list)
        self._rooms: list[dict[int, int]] = []
        used = [self._place(turn, formats, device.type) for turn in range(len(lane.buckets))]
        self.window = Window(max(used), device=device)
        self._works: deque[Work] = deque()
        self._load: Load | None = None

    def _place(self, turn: int, formats: Formats, device: str) -> int:
        """Give every message that cannot be sent from where it is its room in the buffer; return the bytes needed."""
        used = 0
        rooms: dict[int, int] = {}
        messages = self._buckets[turn].messages
        for index, message in enumerate(messages):
            if not _is_movable(message, formats, device):
                rooms[index] = used = aligned(used)
                used += message.nbytes
            offset = rooms.get(index)
            for position, (param, source) in enumerate(message.pieces, start=1):
                last = (index, position) == (len(messages) - 1, len(message.pieces))
                self._pieces[param].append(_Piece(index, offset, source, last))
                offset = offset + source.nbytes if offset is not None else None
        self._rooms.append(rooms)
        return used

    def open(self, group: Group, deadline: Deadline, timer: PhaseTimer, *, checksums: bool) -> None:
        """A sync starts."""
        self._group, self._deadline, self._timer = group, deadline, timer
        self._sums: list[torch.Tensor] | None = [] if checksums else None
        self._turn, self._sent = 0, 0
        self._load = None
        self._works.clear()
        self.window.forget()

    def feed(self, param: int, tensor: torch.Tensor) -> Iterator[Load]:
        """Take what the lane needs of a full tensor; yield every bucket that is complete by now."""
        pieces = self._pieces.get(param, ())
        if pieces and not tensor.is_contiguous():
            tensor = tensor.contiguous()
        for piece in pieces:
            load = self._load = self._load or self._begin()
            if load.params[-1:] != [param]:
                load.params.append(param)
            source = piece.source
            if piece.room is None:
                load.tensors[piece.message] = source.bytes_of(tensor)
            else:
                room = self.window.buffer(load.turn)[piece.room : piece.room + source.nbytes]
                load.rooms.append(room.view(source.dtype).view(source.shape))
                offset = tensor.storage_offset() + source.offset
                load.parts.append(tensor.as_strided(source.shape, source.stride, offset))
            if piece.last:
                # At once: workers that process a stage together may wait for this bucket on another lane.
                self._load = None
                yield load

    def flush(self, load: Load) -> None:
        """Pack the bucket and put it on the wire."""
        waits = bool(load.rooms) or load.spots is None
        with self._timer("wire"):
            # The buffer is free once the broadcast that used it last is done.
            if waits:
                self.window.wait(load.turn, deadline=self._deadline)
        with self._timer("pack"):
            if load.rooms:
                torch._foreach_copy_(load.rooms, load.parts)
        if self._sums is not None:
            with self._timer("verify"):
                self._sums += [checksum(tensor) for tensor in load.tensors]
        with self._timer("wire"):
            work = self._group.broadcast(load.tensors, root=0, deadline=self._deadline)
            if waits:
                self.window.put(load.turn, work, held=load)
            else:
                self._works.append(work)
                if len(self._works) > MOST_UNANSWERED:
                    self._works.popleft().wait(self._deadline)
        self._sent += 1

    def finish(self) -> None:
        """Wait until everything is there; send the checksums."""
        assert self._sent == len(self._buckets)
        with self._timer("wire"):
            for work in self._works:
                work.wait(self._deadline)
            self.window.drain(deadline=self._deadline)
            if self._sums:
                sums = torch.stack(self._sums).view(torch.uint8)
                self._group.broadcast([sums], root=0, deadline=self._deadline).wait(self._deadline)

    def _begin(self) -> Load:
        """The next bucket, with the views of its buffer that will be sent."""
        turn, self._turn = self._turn, self._turn + 1
        tensors = Parcel([NOTHING] * len(self._buckets[turn].messages))
        for index, room in self._rooms[turn].items():
            message = self._buckets[turn].messages[index]
            tensors[index] = self.window.buffer(turn)[room : room + message.nbytes]
        return Load(self.index, turn, tensors)


def _is_movable(message: Message, formats: Formats, device: str) -> bool:
    """Whether it can be sent from where the trainer has it."""
    (param, source), *more = message.pieces
    return not more and source.is_contiguous and formats[param] == (source.dtype, device)
