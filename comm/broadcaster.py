"""The sending side of a plan (runs on every trainer rank)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from rollcast.comm.buckets import Message
from rollcast.comm.checksum import checksum
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group
from rollcast.comm.params import WeightSource
from rollcast.comm.plan import Lane, TransferPlan
from rollcast.comm.region import Region
from rollcast.comm.report import PhaseTimer
from rollcast.comm.window import Window


class WeightBroadcaster:
    """Walks a source in the plan's order and streams the lanes that this trainer rank sends.

        broadcaster = WeightBroadcaster(source, plan, rank=trainer_rank, device=torch.device("cpu"))
        broadcaster.send(groups, deadline=Deadline(60), timer=PhaseTimer())      # groups: {lane index: group}

    Bucket k + 1 is packed while bucket k is on the wire. Buffers are made at the first send and kept.
    """

    def __init__(self, source: WeightSource, plan: TransferPlan, *, rank: int = 0, device: torch.device) -> None:
        self._source = source
        self._plan = plan
        self._lanes = {
            lane.index: _LaneSender(lane, device) for lane in plan.lanes if lane.sender == rank and lane.buckets
        }

    def send(
        self, groups: Mapping[int, Group], *, deadline: Deadline, timer: PhaseTimer, checksums: bool = False
    ) -> None:
        """Send every weight once, then their checksums if asked to. Collective over the trainer ranks.

        `groups` has the groups of this rank's lanes, of which it is rank 0. A failure of the wire is raised after
        the walk: the other trainer ranks gather shards with this one and would wait for it for ever.
        """
        tensors = _timed(self._source.walk(self._plan.walk), timer)
        try:
            streams = [
                _LaneStream(sender, groups[index], deadline, timer, checksums=checksums)
                for index, sender in self._lanes.items()
            ]
            for param, tensor in tensors:
                for stream in streams:
                    stream.feed(param, tensor)
            for stream in streams:
                stream.finish()
        except Exception:
            drain(tensors)
            raise


class _LaneSender:
    """What is needed of each parameter for one lane, and where it goes."""

    def __init__(self, lane: Lane, device: torch.device) -> None:
        self.buckets = lane.buckets
        self.device = device
        self.window = Window(max(bucket.nbytes for bucket in lane.buckets), device=device)
        self.pieces: dict[int, list[_Piece]] = defaultdict(list)
        for bucket in lane.buckets:
            for index, message in enumerate(bucket.messages):
                offset = message.offset
                alone = len(message.pieces) == 1
                for param, source in message.pieces:
                    end = offset + source.nbytes
                    movable = alone and source.is_contiguous
                    self.pieces[param].append(_Piece(index, offset, source, movable, last=end == bucket.nbytes))
                    offset = end


@dataclass(frozen=True, slots=True)
class _Piece:
    message: int
    """Index in its bucket."""
    offset: int
    """First byte in the bucket's buffer."""
    source: Region
    movable: bool
    """Whether it can be sent from where it is, as a message of its own."""
    last: bool
    """Whether it completes its bucket."""


class _LaneStream:
    """One lane in one sync: fills buckets from the parameters as they come."""

    def __init__(
        self, lane: _LaneSender, group: Group, deadline: Deadline, timer: PhaseTimer, *, checksums: bool
    ) -> None:
        self._lane, self._group, self._deadline, self._timer = lane, group, deadline, timer
        self._sums: list[torch.Tensor] | None = [] if checksums else None
        self._turn = 0
        self._unpacked: dict[int, torch.Tensor] = {}
        self._rooms: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []
        lane.window.forget()

    def feed(self, param: int, tensor: torch.Tensor) -> None:
        """Take what the lane needs of a full tensor; send every bucket that is complete by now."""
        pieces = self._lane.pieces.get(param, ())
        if pieces and not tensor.is_contiguous():
            tensor = tensor.contiguous()
        for piece in pieces:
            source = piece.source
            if piece.movable and (tensor.dtype, tensor.device.type) == (source.dtype, self._lane.device.type):
                self._unpacked[piece.message] = source.bytes_of(tensor)
            else:
                room = self._lane.window.buffer(self._turn)[piece.offset : piece.offset + source.nbytes]
                self._rooms.append(room.view(source.dtype).view(source.shape))
                offset = tensor.storage_offset() + source.offset
                self._parts.append(tensor.as_strided(source.shape, source.stride, offset))
            if piece.last:
                # At once: workers that process a stage together may wait for this bucket on another lane.
                self._flush()

    def finish(self) -> None:
        """Wait until everything is there; send the checksums."""
        assert self._turn == len(self._lane.buckets)
        with self._timer("wire"):
            self._lane.window.drain(deadline=self._deadline)
            if self._sums:
                sums = torch.stack(self._sums).view(torch.uint8)
                self._group.broadcast([sums], root=0, deadline=self._deadline).wait(self._deadline)

    def _flush(self) -> None:
        """Pack the bucket and put it on the wire."""
        bucket, window = self._lane.buckets[self._turn], self._lane.window
        with self._timer("wire"):
            # The buffer is free once the broadcast that used it last is done.
            window.wait(self._turn, deadline=self._deadline)
        with self._timer("pack"):
            if self._rooms:
                torch._foreach_copy_(self._rooms, self._parts)
        tensors = [self._wire(index, message) for index, message in enumerate(bucket.messages)]
        if self._sums is not None:
            with self._timer("verify"):
                self._sums += [checksum(tensor) for tensor in tensors]
        with self._timer("wire"):
            work = self._group.broadcast(tensors, root=0, deadline=self._deadline)
            window.put(self._turn, work, held=tensors)
        self._turn += 1
        self._unpacked, self._rooms, self._parts = {}, [], []

    def _wire(self, index: int, message: Message) -> torch.Tensor:
        if index in self._unpacked:
            return self._unpacked[index]
        return self._lane.window.buffer(self._turn)[message.offset : message.offset + message.nbytes]


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
