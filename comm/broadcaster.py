"""The sending side of a plan (runs on every trainer rank)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rollcast.comm.buckets import Message, aligned
from rollcast.comm.checksum import checksum
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group, Parcel, Work
from rollcast.comm.plan import Lane, TransferPlan
from rollcast.comm.region import Region
from rollcast.comm.report import PhaseTimer
from rollcast.comm.source import WeightSource
from rollcast.comm.window import Window

Formats = Sequence[tuple[torch.dtype, str]]
NOTHING = torch.empty(0, dtype=torch.uint8)


class WeightBroadcaster:
    """Walks a source in the plan's order and streams the lanes that this trainer rank sends.

        broadcaster = WeightBroadcaster(source, plan, rank=trainer_rank, device=torch.device("cpu"))
        broadcaster.send(groups, deadline=Deadline(60), timer=PhaseTimer())      # groups: {lane index: group}

    Bucket k + 1 is packed while bucket k is on the wire. Buffers are made at the first send and kept; so are the
    views of weights that stay where they are, and then no weight costs a line of Python, and what needs no buffer is on
    its way at once.
    """

    def __init__(self, source: WeightSource, plan: TransferPlan, *, rank: int = 0, device: torch.device) -> None:
        self._source = source
        self._plan = plan
        self._device = device
        self._own = [lane for lane in plan.lanes if lane.sender == rank and lane.buckets]
        self._lanes: dict[int, _LaneSender] = {}
        self._formats: Formats = ()
        self._bound: tuple[list[torch.Tensor], list[_Load]] | None = None

    def send(
        self,
        groups: Mapping[int, Group],
        *,
        deadline: Deadline,
        timer: PhaseTimer,
        checksums: bool = False,
        looked: bool = False,
    ) -> None:
        """Send every weight once, then their checksums if asked to. Collective over the trainer ranks.

        `groups` has the groups of this rank's lanes, of which it is rank 0. With `looked` the caller has called
        `source.current()` for this very send. A failure of the wire is raised after the walk: the other trainer
        ranks gather shards with this one and would wait for it for ever.
        """
        if not looked:
            self._source.current()
        self._lay_out()
        loads = self._loads(timer)
        try:
            for lane in self._lanes.values():
                lane.open(groups[lane.index], deadline, timer, checksums=checksums)
            for load in loads:
                self._lanes[load.lane].flush(load)
            for lane in self._lanes.values():
                lane.finish()
        except Exception:
            drain(loads)
            raise

    def release(self) -> None:
        """Let go of the weights' memory; the next `send` finds it again. Buffers are kept."""
        self._bound = None

    def _lay_out(self) -> None:
        """Plan the buffers, for weights as the trainer has them now."""
        if self._bound is not None and self._bound[0] is self._source.steady():
            return
        formats = self._source.formats()
        if not self._lanes or formats != self._formats:
            self._lanes = {lane.index: _LaneSender(lane, formats, self._device) for lane in self._own}
            self._formats = formats
        self._bound = None

    def _loads(self, timer: PhaseTimer) -> "Iterator[_Load]":
        """Every bucket of every lane, in the order of the walk, ready to be packed and sent."""
        steady = self._source.steady()
        if self._bound is not None and self._bound[0] is steady:
            yield from self._bound[1]
            return
        made: list[_Load] = []
        for param, tensor in _timed(self._source.walk(self._plan.walk), timer):
            for lane in self._lanes.values():
                for load in lane.feed(param, tensor):
                    if steady is not None:
                        load.stays = True
                        made.append(load)
                    yield load
        self._bound = (steady, made) if steady is not None else None


@dataclass(slots=True)
class _Load:
    """One bucket on its way out."""

    lane: int
    turn: int
    tensors: Parcel
    """Of each message: the bytes to send, from where they are or in the bucket's buffer."""
    stays: bool = False
    """Whether the weights stay where they are. Else they are let go when they are sent."""
    rooms: list[torch.Tensor] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    """What is copied into `rooms`, views of the buffer, before."""


@dataclass(frozen=True, slots=True)
class _Piece:
    message: int
    """Index in its bucket."""
    room: int | None
    """First byte in the bucket's buffer. None: sent from where it is, as a message of its own."""
    source: Region
    last: bool
    """Whether it completes its bucket."""


class _LaneSender:
    """One lane: what it needs of each parameter and where that goes; in a sync, its buckets on the wire."""

    def __init__(self, lane: Lane, formats: Formats, device: torch.device) -> None:
        self.index = lane.index
        self._buckets = lane.buckets
        self._pieces: dict[int, list[_Piece]] = defaultdict(list)
        self._rooms: list[dict[int, int]] = []
        used = [self._place(turn, formats, device.type) for turn in range(len(lane.buckets))]
        self.window = Window(max(used), device=device)
        self._works: list[Work] = []
        self._load: _Load | None = None

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

    def feed(self, param: int, tensor: torch.Tensor) -> Iterator[_Load]:
        """Take what the lane needs of a full tensor; yield every bucket that is complete by now."""
        pieces = self._pieces.get(param, ())
        if pieces and not tensor.is_contiguous():
            tensor = tensor.contiguous()
        for piece in pieces:
            load = self._load = self._load or self._begin()
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

    def flush(self, load: _Load) -> None:
        """Pack the bucket and put it on the wire."""
        waits = bool(load.rooms) or not load.stays
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

    def _begin(self) -> _Load:
        """The next bucket, with the views of its buffer that will be sent."""
        turn, self._turn = self._turn, self._turn + 1
        tensors = Parcel([NOTHING] * len(self._buckets[turn].messages))
        for index, room in self._rooms[turn].items():
            message = self._buckets[turn].messages[index]
            tensors[index] = self.window.buffer(turn)[room : room + message.nbytes]
        return _Load(self.index, turn, tensors)


def _is_movable(message: Message, formats: Formats, device: str) -> bool:
    """Whether it can be sent from where the trainer has it."""
    (param, source), *more = message.pieces
    return not more and source.is_contiguous and formats[param] == (source.dtype, device)


def drain(tensors: Iterator[object]) -> None:
    """Walk the rest, which the other ranks walk too."""
    for _ in tensors:
        pass


def _timed(tensors: Iterator[tuple[int, torch.Tensor]], timer: PhaseTimer) -> Iterator[tuple[int, torch.Tensor]]:
    while True:
        with timer("gather"):
            item = next(tensors, None)
        if item is None:
            return
        yield item
