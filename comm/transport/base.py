"""The weight group: its rendezvous and the one interface that its transports share.

A group is separate from torch's default process group. Rank 0 hosts the store on a free port; the address
reaches the other ranks over the control plane.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rollcast.comm.deadline import Deadline


class Parcel(list[torch.Tensor]):
    """Tensors that are broadcast again and again, and stay where they are for as long as this lives."""

    note: tuple[Any, Any] | None = None
    """What a group knows of them: the circumstances under which it holds, and what."""

    def known(self, when: Any) -> Any:
        """What was noted under just these circumstances, else None."""
        return self.note[1] if self.note is not None and self.note[0] == when else None


class Work(Protocol):
    """A grouped broadcast under way."""

    def wait(self, deadline: Deadline) -> None:
        """Block until the tensors may be read (or overwritten, on the root). Raises when a peer is lost."""
        ...


class Group(Protocol):
    """Ranks that share a stream of broadcasts. Every rank issues the same broadcasts in the same order."""

    rank: int
    size: int
    gentle: bool
    """Whether others need this rank's GPU and interpreter meanwhile: then it takes little of them, and more time."""

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> Work:
        """Start to copy every tensor (contiguous uint8, not empty) from rank `root` to all others. Collective.

        One grouped collective: both sides pass as many tensors, of the same sizes in the same order. What comes again
        in the next sync is a `Parcel`.
        """
        ...

    def ready(self) -> bool:
        """Whether `broadcast` can start without a wait for the root. (Only some transports wait.)"""
        ...

    def release(self) -> None:
        """Let go of peers' memory that is mapped here, if any. No broadcast may be under way."""
        ...

    def close(self) -> None:
        """Leave the group. Idempotent. Peers that still wait for this rank fail at once instead of hanging."""
        ...
