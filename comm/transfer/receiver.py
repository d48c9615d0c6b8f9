"""The receiving side of a plan (runs in every vLLM worker)."""

from collections.abc import Callable

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.device.checksum import checksum
from rollcast.comm.device.fused_copy import FusedCopy
from rollcast.comm.device.storage import aligned, flat_bytes
from rollcast.comm.plan.buckets import Message
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.report import PhaseTimer
from rollcast.comm.transfer.buffer_ring import DEPTH, Window
from rollcast.comm.transfer.landing import Landing, VerifyError
from rollcast.comm.transport.base import Group, Parcel, Work

# Buckets that may travel while live parameters are still read: as long as a wire is busy in the time of a decoding step
# or two.
AHEAD = 4
DAMAGED = "arrived damaged: its checksum is not the sender's"


class WeightReceiver:
    """Receives the buckets of a lane, in place wherever the layouts allow.

        receiver = WeightReceiver(lane, landing, device=device)
        receiver.receive(group, deadline=Deadline(60), timer=PhaseTimer())

    Bucket k + 1 is on its way before bucket k has arrived. Views and buffers are made once and kept.

    `start` makes use of the time for which live parameters are still read: the first buckets travel meanwhile.
    """

    def __init__(self, lane: Lane, landing: Landing, *, device: torch.device) -> None:
        self.lane = lane
        self._landing = landing
        self.device = device
        self._buckets = [[Inbox(message, landing, device) for message in bucket.messages] for bucket in lane.buckets]
        self._staged = [
            [index for index, box in enumerate(bucket) if box.message.stage is not None] for bucket in self._buckets
        ]
        self._window = Window(max((lay_out(bucket) for bucket in self._buckets), default=0), device=device)
        # Posted tensors and their copies into live parameters are the same at every sync.
        self._bound: dict[int, tuple[Parcel, list[torch.Tensor], list[torch.Tensor]]] = {}
        self._ahead: list[Ahead] = []
        self.started = 0
        """Buckets that travel since `start`."""

    def get_ahead(self, spare_of: Callable[[torch.device], int]) -> bool:
        """Make ready for `start`, once, in memory that the device can spare. Whether there is room for any bucket."""
        if not self._ahead:
            spare = spare_of(self.device)
            buffered = any(not box.in_place for bucket in self._buckets[:AHEAD] for box in bucket)
            for turn, bucket in enumerate(self._buckets[: DEPTH if buffered else AHEAD]):
                spare -= spare_bytes(bucket)
                if spare < 0:
                    break
                try:
                    self._ahead.append(Ahead(bucket, self._bind(turn)[0]))
                except torch.OutOfMemoryError:
                    # What is spare may lie in pieces.
                    break
        return bool(self._ahead)

    def release(self) -> None:
        """Give spare memory and buffers back; they are made again when they are needed."""
        self._ahead = []
        self._bound.clear()
        self._window.release()

    def start(self, group: Group, *, deadline: Deadline) -> None:
        """Start to receive what there is of the first buckets, beside the live parameters, after `get_ahead`.

        `receive` goes on from there.
        """
        self._window.forget()
        started = 0
        for ahead in self._ahead:
            if started and not group.ready():
                break
            ahead.work = group.broadcast(ahead.posted, root=0, deadline=deadline)
            started += 1
        self.started = started

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
        started, self.started = self.started, 0
        if not started:
            self._window.forget()
        sums: list[torch.Tensor] = []
        try:
            self._landing.begin()
            self._post(0, group, deadline, started)
            for turn in range(len(self._buckets)):
                with timer("wire"):
                    # Before the wait: the wire must not stand still between two buckets.
                    self._post(turn + 1, group, deadline, started)
                    if meanwhile is not None and not turn:
                        meanwhile()
                    if turn < started:
                        self._ahead[turn].wait(deadline)
                    else:
                        self._window.wait(turn, deadline=deadline)
                if checksums:
                    with timer("verify"):
                        sums += map(checksum, self._ahead[turn].posted if turn < started else self._bind(turn)[0])
                with timer("apply"):
                    if turn < started:
                        self._ahead[turn].copy.run()
                    self._apply(turn)
            if sums:
                with timer("verify"):
                    self._compare(sums, group, deadline)
            with timer("apply"):
                self._landing.commit()
        except BaseException:
            self._landing.abandon()
            raise

    def confirm(self, group: Group, *, deadline: Deadline, timer: PhaseTimer) -> None:
        """Receive everything again and compare it with what is in memory. Collective over the lane.

        Live parameters are compared bit for bit; a stage is landed and processed again, which must change
        nothing. Raises `VerifyError` naming the first part that differs.
        """
        with timer("verify"):
            try:
                self._landing.begin(confirming=True)
                for turn, bucket in enumerate(self._buckets):
                    tensors = [torch.empty(box.nbytes, dtype=torch.uint8, device=self.device) for box in bucket]
                    group.broadcast(tensors, root=0, deadline=deadline).wait(deadline)
                    for box, tensor in zip(bucket, tensors, strict=True):
                        box.confirm(tensor)
                    for stage in self.lane.buckets[turn].finishes:
                        self._landing.finish(stage)
                self._landing.commit()
            except BaseException:
                self._landing.abandon()
                raise

    def _post(self, turn: int, group: Group, deadline: Deadline, started: int) -> None:
        """Start to receive bucket number `turn`, if there is one that is not among the `started`."""
        if started <= turn < len(self._buckets):
            self._window.wait(turn, deadline=deadline)
            self._window.put(turn, group.broadcast(self._bind(turn)[0], root=0, deadline=deadline))

    def _bind(self, turn: int) -> tuple[Parcel, list[torch.Tensor], list[torch.Tensor]]:
        """Of a bucket: the tensors to receive into; targets and sources of the copies into live parameters."""
        if turn not in self._bound:
            posted, targets, sources = Parcel(), [], []
            for box in self._buckets[turn]:
                posted.append(box.posted(self._window, turn))
                if box.copied:
                    targets.append(box.target())
                    sources.append(box.typed(posted[-1]))
            self._bound[turn] = posted, targets, sources
        return self._bound[turn]

    def _apply(self, turn: int) -> None:
        posted, targets, sources = self._bind(turn)
        if targets:
            torch._foreach_copy_(targets, sources)
        for index in self._staged[turn]:
            box = self._buckets[turn][index]
            box.target().copy_(box.typed(posted[index]))
        for stage in self.lane.buckets[turn].finishes:
            self._landing.finish(stage)

    def _compare(self, sums: list[torch.Tensor], group: Group, deadline: Deadline) -> None:
        mine = torch.stack(sums)
        theirs = torch.empty_like(mine)
        group.broadcast([theirs.view(torch.uint8)], root=0, deadline=deadline).wait(deadline)
        for index in (mine != theirs).nonzero().flatten().tolist():
            raise VerifyError(f"run {index} of lane {self.lane.index}, {self.lane.messages[index]}, {DAMAGED}")


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
