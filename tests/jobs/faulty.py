"""A worker that fails inside the receive when a file says so."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rollcast.comm import Deadline, Group
from rollcast.comm.group import Work
from rollcast.rollout.extension import RollcastWorker

FAULT = Path(os.environ["FAULT_FILE"])


class FaultyWorker(RollcastWorker):
    """Reads what to do from the file named by FAULT_FILE: "raise", "hang", "flip ..." or nothing."""

    def rollcast_join(self, *arguments: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().rollcast_join(*arguments)
        assert self.rollcast_group is not None
        self.rollcast_group = FlippingGroup(self.rollcast_group)

    def rollcast_receive(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, version: int, *arguments: Any
    ) -> dict[str, float]:
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
        return super().rollcast_receive(version, *arguments)


def damage(worker: RollcastWorker, commit: Any) -> None:
    """After everything has landed, a bit of a live tensor changes."""
    commit()
    if FAULT.read_text():
        FAULT.write_text("")
        worker.rollcast_landing.live("model.norm.weight").view(torch.uint8)[5] ^= 4


class FlippingGroup:
    """Flips a bit of the first tensor that arrives, once."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> Work:
        work = self._group.broadcast(tensors, root=root, deadline=deadline)
        if FAULT.read_text() != "flip":
            return work
        FAULT.write_text("")
        return FlippingWork(work, tensors[0])

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
