"""A worker that fails inside the receive, or whose weights move before it, when a file says so."""

import copy
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollcast.comm import Deadline, Group
from rollcast.comm.transport.base import Work
from rollcast.rollout.worker.extension import RollcastWorker

FAULT = Path(os.environ["FAULT_FILE"])


class FaultyWorker(RollcastWorker):
    """Reads what to do from the file named by FAULT_FILE: "raise", "hang", "flip ...", "move ..." or nothing."""

    def rollcast_join(self, *arguments: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().rollcast_join(*arguments)
        assert self.rollcast_group is not None
        worker: Any = self
        self.rollcast_group = FlippingGroup(self.rollcast_group, worker.rank)

    def rollcast_receive(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, version: int, *arguments: Any
    ) -> dict[str, dict[str, Any]]:
        fault = FAULT.read_text()
        if fault == "raise":
            try:
                raise RuntimeError(f"the worker dropped version {version} on the floor")
            finally:
                self.rollcast_leave()
        if fault == "hang":
            FAULT.write_text(f"pid {os.getpid()}")
            time.sleep(3600)
        if fault == "flip after the checksum":
            commit = self.rollcast_landing.commit
            self.rollcast_landing.commit = lambda: damage(self, commit)  # type: ignore[method-assign]
        self._move_if_told(fault)
        return super().rollcast_receive(version, *arguments)

    def rollcast_receive_aside(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, version: int, *arguments: Any
    ) -> dict[str, dict[str, Any]]:
        self._move_if_told(FAULT.read_text())
        return super().rollcast_receive_aside(version, *arguments)

    def _move_if_told(self, fault: str) -> None:
        if fault.startswith("move"):
            assert self.rollcast_gate is not None
            # As a call of vLLM's; "unseen", as nothing known does.
            with nullcontext() if "unseen" in fault else self.rollcast_gate.passing():
                move_weights(self._rollcast_model(), torch.bfloat16 if fault == "move to bfloat16" else torch.float32)


def move_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """As vLLM might: one parameter gets other memory, one becomes another object, one module becomes another."""
    layer: Any = model.get_submodule("model.layers.0")
    layer.post_attention_layernorm.weight.data = torch.zeros_like(layer.post_attention_layernorm.weight)
    layer.self_attn.q_norm.weight = nn.Parameter(torch.zeros_like(layer.self_attn.q_norm.weight, dtype=dtype))
    norm: Any = copy.deepcopy(model.get_submodule("model.norm"))
    norm.weight.data = torch.zeros_like(norm.weight)
    model.get_submodule("model").norm = norm


def damage(worker: RollcastWorker, commit: Any) -> None:
    """After everything has landed, a bit of a live tensor changes."""
    commit()
    if FAULT.read_text():
        FAULT.write_text("")
        worker.rollcast_landing.live("model.norm.weight").view(torch.uint8)[5] ^= 4


class FlippingGroup:
    """Flips a bit of the first tensor that arrives, once: "flip" in any worker, "flip 1" in that of rank 1."""

    def __init__(self, group: Group, worker: int) -> None:
        self.rank, self.size, self.gentle = group.rank, group.size, group.gentle
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

    def release(self) -> None: ...

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
