"""The receiving side of a plan (runs in every vLLM worker)."""

from typing import Protocol

import torch

from rollcast.comm.buckets import Message, aligned
from rollcast.comm.checksum import checksum
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group
from rollcast.comm.plan import Lane
from rollcast.comm.region import flat_bytes
from rollcast.comm.report import PhaseTimer
from rollcast.comm.window import Window


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


class WeightReceiver:
    """Receives the buckets of a lane, in place wherever the layouts allow.

        receiver = WeightReceiver(lane, landing, device=device)
        receiver.receive(group, deadline=Deadline(60), timer=PhaseTimer())

    Bucket k + 1 is on its way before bucket k has arrived. Views and buffers are made once and kept.
    """

    def __init__(self, lane: Lane, landing: Landing, *, device: torch.device) -> None:
        self.lane = lane
        self._landing = landing
        self._device = device
        self._buckets = [[_Inbox(message, landing, device) for message in bucket.messages] for bucket in lane.buckets]
        self._staged = [
            [index for index, box in enumerate(bucket) if box.message.stage is not None] for bucket in self._buckets
        ]
        self._window = Window(max((_lay_out(bucket) for bucket in self._buckets), default=0), device=device)
        # Posted tensors and their copies into live parameters are the same at every sync.
        self._bound: dict[int, tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = {}

    def receive(self, group: Group, *, deadline: Deadline, timer: PhaseTimer, checksums: bool = False) -> None:
        """Receive and land every weight once. Collective over the lane.

        With `checksums` the sender's are received too and compared with those of what arrived. Raises
        `VerifyError` naming the first message that differs.
        """
        self._window.forget()
        sums: list[torch.Tensor] = []
        try:
            self._landing.begin()
            self._post(0, group, deadline)
            for turn in range(len(self._buckets)):
                with timer("wire"):
                    # Before the wait: the wire must not stand still between two buckets.
                    self._post(turn + 1, group, deadline)
                    self._window.wait(turn, deadline=deadline)
                if checksums:
                    with timer("verify"):
                        sums += [checksum(tensor) for tensor in self._bind(turn)[0]]
                with timer("apply"):
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
                    tensors = [torch.empty(box.nbytes, dtype=torch.uint8, device=self._device) for box in bucket]
                    group.broadcast(tensors, root=0, deadline=deadline).wait(deadline)
                    for box, tensor in zip(bucket, tensors, strict=True):
                        box.confirm(tensor)
                    for stage in self.lane.buckets[turn].finishes:
                        self._landing.finish(stage)
                self._landing.commit()
            except BaseException:
                self._landing.abandon()
                raise

    def _post(self, turn: int, group: Group, deadline: Deadline) -> None:
        """Start to receive bucket number `turn`, if there is one."""
        if turn < len(self._buckets):
            self._window.wait(turn, deadline=deadline)
            self._window.put(turn, group.broadcast(self._bind(turn)[0], root=0, deadline=deadline))

    def _bind(self, turn: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Of a bucket: the tensors to receive into; targets and sources of the copies into live parameters."""
        if turn not in self._bound:
            posted, targets, sources = [], [], []
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


DAMAGED = "arrived damaged: its checksum is not the sender's"


class _Inbox:
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


def _lay_out(bucket: list[_Inbox]) -> int:
    """Give every message that is not received in place its own room in the buffer; return the bytes needed."""
    used = 0
    for box in bucket:
        if not box.in_place:
            box.offset = used
            used = aligned(used + box.nbytes)
    return used
