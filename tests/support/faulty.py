"""A worker's side of a sync that fails inside the receive, or whose weights move before it, as a file says."""

import copy
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollcast.comm import Deadline, Group, LaneGroups
from rollcast.comm.transport import Work
from rollcast.rollout.protocol.messages import JoinGroup, ReceiveResult
from rollcast.rollout.worker import WorkerSync

FAULT = Path(os.environ["FAULT_FILE"])
HANGING = FAULT.with_name(f"{FAULT.name}.pid")


class FaultySync(WorkerSync):
    """Reads its fault from the file named by FAULT_FILE: "raise", "hang", "flip ...", "move ..." or nothing."""

    def join(self, request: JoinGroup) -> None:
        super().join(request)
        assert self.groups is not None
        self.groups = LaneGroups({lane: FlippingGroup(group, self.rank) for lane, group in self.groups.items()})

    def receive(self, *, version: int, **arguments: Any) -> ReceiveResult:
        fault = FAULT.read_text()
        if fault == "raise":
            self.leave()
            raise RuntimeError(f"the worker dropped version {version} on the floor")
        if fault == "hang":
            # Beside the fault, which the other workers have still to read: all of them hang.
            HANGING.write_text(str(os.getpid()))
            time.sleep(3600)
        if fault == "flip after the checksum":
            commit = self.landing.commit
            self.landing.commit = lambda: damage(self, commit)  # type: ignore[method-assign]
        self._move_weights(fault)
        return super().receive(version=version, **arguments)

    def receive_shadow(self, **arguments: Any) -> ReceiveResult:
        self._move_weights(FAULT.read_text())
        return super().receive_shadow(**arguments)

    def _move_weights(self, fault: str) -> None:
        if fault.startswith("move"):
            # Inside a call of vLLM's; "unseen": outside of any call that rollcast knows.
            with nullcontext() if "unseen" in fault else self.passing_gate():
                move_weights(self.model.module, torch.bfloat16 if fault == "move to bfloat16" else torch.float32)


def move_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Do as vLLM might: give one parameter other memory, replace another by a new object, and replace a module."""
    layer: Any = model.get_submodule("model.layers.0")
    layer.post_attention_layernorm.weight.data = torch.zeros_like(layer.post_attention_layernorm.weight)
    layer.self_attn.q_norm.weight = nn.Parameter(torch.zeros_like(layer.self_attn.q_norm.weight, dtype=dtype))
    norm: Any = copy.deepcopy(model.get_submodule("model.norm"))
    norm.weight.data = torch.zeros_like(norm.weight)
    model.get_submodule("model").norm = norm


def damage(sync: WorkerSync, commit: Any) -> None:
    """Flip a bit of a live tensor after everything has landed."""
    commit()
    if FAULT.read_text():
        FAULT.write_text("")
        sync.landing.live("model.norm.weight").view(torch.uint8)[5] ^= 4


class FlippingGroup:
    """Flips a bit of the first tensor that arrives, once: "flip" in any worker, "flip 1" in that of rank 1."""

    def __init__(self, group: Group, worker: int) -> None:
        self.rank, self.size, self.low_priority = group.rank, group.size, group.low_priority
        self._faults = ("flip", f"flip {worker}")
        self._group = group

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> Work:
        work = self._group.broadcast(tensors, root=root, deadline=deadline)
        if FAULT.read_text() not in self._faults:
            return work
        FAULT.write_text("")
        return FlippingWork(work, tensors[0])

    def ready(self) -> bool:
        return True

    def unmap(self) -> None: ...

    def close(self) -> None:
        self._group.close()


class FlippingWork:
    """Done when the broadcast is, and the bit is flipped."""

    def __init__(self, work: Work, tensor: torch.Tensor) -> None:
        self._work = work
        self._tensor = tensor

    def wait(self, deadline: Deadline) -> None:
        self._work.wait(deadline)
        self._tensor[self._tensor.numel() // 2] ^= 16
