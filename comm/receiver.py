"""The receiving side of a plan (runs in every vLLM worker)."""

from typing import Protocol

import torch

from rollcast.comm.buffers import BucketBuffers
from rollcast.comm.deadline import Deadline
from rollcast.comm.group import Group
from rollcast.comm.plan import BucketPlan, Slot
from rollcast.comm.report import PhaseTimer


class Landing(Protocol):
    """Where received parameters go."""

    def begin(self) -> None:
        """A sync starts: the parameters may be written from now on."""
        ...

    def land(self, param: int, tensor: torch.Tensor) -> None:
        """Write parameter number `param` of the manifest. `tensor` is only valid during the call."""
        ...

    def commit(self) -> None:
        """All parameters have landed: finish whatever needs them together."""
        ...


class WeightReceiver:
    """Receives the buckets of a plan and lands their parameters.

        receiver = WeightReceiver(plan, device=device)
        receiver.receive(group, landing, deadline=Deadline(60), timer=PhaseTimer())

    Bucket k + 1 is received while bucket k is applied. Buffers are made at the first sync and kept.
    """

    def __init__(self, plan: BucketPlan, *, device: torch.device) -> None:
        self.plan = plan
        self._device = device
        self._buffers: BucketBuffers | None = None
        # Parameters that are larger than a bucket arrive in parts and are put together here.
        self._whole: dict[int, torch.Tensor] = {}

    def receive(self, group: Group, landing: Landing, *, deadline: Deadline, timer: PhaseTimer) -> None:
        """Receive and land every weight once. Collective over the weight group."""
        if self._buffers is None:
            self._buffers = BucketBuffers(self.plan.buffer_bytes, device=self._device)
        self._buffers.forget()
        landing.begin()
        self._post(0, group, deadline)
        for turn, bucket in enumerate(self.plan.buckets):
            with timer("wire"):
                buffer = self._buffers.take(turn, deadline=deadline)
                self._post(turn + 1, group, deadline)
            with timer("apply"):
                for slot in bucket.slots:
                    self._apply(slot, buffer, landing)
        with timer("apply"):
            landing.commit()

    def _post(self, turn: int, group: Group, deadline: Deadline) -> None:
        """Start to receive bucket number `turn`, if there is one."""
        assert self._buffers is not None
        if turn < len(self.plan.buckets):
            buffer = self._buffers.take(turn, deadline=deadline)[: self.plan.buckets[turn].nbytes]
            self._buffers.put(turn, group.broadcast(buffer, root=0, deadline=deadline))

    def _apply(self, slot: Slot, buffer: torch.Tensor, landing: Landing) -> None:
        spec = self.plan.manifest.specs[slot.param]
        part = buffer[slot.offset : slot.offset + slot.numel * spec.dtype.itemsize].view(spec.dtype)
        if slot.numel == spec.numel:
            landing.land(slot.param, part.view(spec.shape))
            return
        if slot.param not in self._whole:
            self._whole[slot.param] = torch.empty(spec.numel, dtype=spec.dtype, device=self._device)
        whole = self._whole[slot.param]
        whole[slot.start : slot.start + slot.numel].copy_(part)
        if slot.start + slot.numel == spec.numel:
            # Not kept: the memory belongs to the engine between syncs.
            landing.land(slot.param, self._whole.pop(slot.param).view(spec.shape))
