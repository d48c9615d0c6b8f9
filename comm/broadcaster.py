"""The sending side of a plan (runs on every trainer rank)."""

from collections.abc import Iterator

import torch

from rollcast.comm.buffers import COUNT, BucketBuffers
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group
from rollcast.comm.params import ParamSpec, WeightSource
from rollcast.comm.plan import BucketPlan, Slot
from rollcast.comm.report import PhaseTimer


class WeightBroadcaster:
    """Walks a source in manifest order and, on the sending rank, streams it bucket by bucket.

        broadcaster = WeightBroadcaster(source, plan, device=torch.device("cpu"))
        broadcaster.send(group, deadline=Deadline(60), timer=PhaseTimer())      # group: None except on the sender

    Bucket k + 1 is packed while bucket k is on the wire. Buffers are made at the first send and kept.
    """

    def __init__(self, source: WeightSource, plan: BucketPlan, *, device: torch.device) -> None:
        self._source = source
        self._plan = plan
        self._device = device
        self._buffers: BucketBuffers | None = None

    def send(self, group: Group | None, *, deadline: Deadline, timer: PhaseTimer) -> None:
        """Send every weight once. Collective over the trainer ranks; `group` is None on ranks that only gather.

        A failure of the wire is raised after the walk: the other trainer ranks gather shards with this one and
        would wait for it for ever.
        """
        tensors = _timed(iter(self._source), timer)
        try:
            if group is not None:
                self._stream(group, tensors, deadline, timer)
        except Exception:
            drain(tensors)
            raise
        drain(tensors)

    def _stream(
        self,
        group: Group,
        tensors: Iterator[tuple[ParamSpec, torch.Tensor]],
        deadline: Deadline,
        timer: PhaseTimer,
    ) -> None:
        if self._buffers is None:
            self._buffers = BucketBuffers(self._plan.buffer_bytes, device=self._device)
        self._buffers.forget()
        tensor = torch.empty(0)
        for turn, bucket in enumerate(self._plan.buckets):
            with timer("wire"):
                buffer = self._buffers.take(turn, deadline=deadline)
            for slot in bucket.slots:
                if slot.start == 0:
                    _, tensor = next(tensors)
                with timer("pack"):
                    _pack(tensor, slot, self._plan, buffer)
            with timer("wire"):
                work = group.broadcast(buffer[: bucket.nbytes], root=0, deadline=deadline)
                self._buffers.put(turn, work)
        with timer("wire"):
            for turn in range(COUNT):
                self._buffers.wait(turn, deadline=deadline)


def drain(tensors: Iterator[object]) -> None:
    """Walk the rest, which the other ranks walk too."""
    for _ in tensors:
        pass


def _timed(
    tensors: Iterator[tuple[ParamSpec, torch.Tensor]], timer: PhaseTimer
) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    while True:
        with timer("gather"):
            item = next(tensors, None)
        if item is None:
            return
        yield item


def _pack(tensor: torch.Tensor, slot: Slot, plan: BucketPlan, buffer: torch.Tensor) -> None:
    """Copy a slot's elements into the bucket, casting to the wire dtype."""
    spec = plan.manifest.specs[slot.param]
    nbytes = slot.numel * spec.dtype.itemsize
    target = buffer[slot.offset : slot.offset + nbytes].view(spec.dtype)
    if slot.numel == spec.numel:
        # Whole: the copy reads a strided source as it is.
        target.view(spec.shape).copy_(tensor)
    else:
        target.copy_(tensor.reshape(-1)[slot.start : slot.start + slot.numel])
