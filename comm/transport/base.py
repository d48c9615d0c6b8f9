"""The one interface that every transport has: `Group`, its `Work`, and the tensors it may remember (both sides)."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rollcast.comm.deadline import Deadline


class PersistentTensors(list[torch.Tensor]):
    """Tensors that are broadcast again at every sync, and keep their memory for as long as this list lives.

    A transport stores here what it computed from their addresses (IPC handles, a CUDA graph of copies).
    """

    _cached: tuple[Any, Any] | None = None

    def cached(self, key: Any) -> Any:
        """Return what was stored under an equal key, else None."""
        return self._cached[1] if self._cached is not None and self._cached[0] == key else None

    def cache(self, key: Any, value: Any) -> None:
        """Store `value` under `key`, in place of what was stored before."""
        self._cached = (key, value)

    def pop_cached(self) -> Any:
        """Remove and return what is stored, whatever its key; None if nothing is."""
        cached, self._cached = self._cached, None
        return None if cached is None else cached[1]


class TensorError(RuntimeError):
    """A broadcast failed because of one of its tensors."""

    def __init__(self, index: int, text: str) -> None:
        """`index` is the tensor's in the broadcast, `text` what is wrong with it."""
        super().__init__(f"tensor {index}: {text}")
        self.index = index
        self.text = text


class Work(Protocol):
    """A grouped broadcast under way."""

    def wait(self, deadline: Deadline) -> None:
        """Block until the tensors may be read (on the root: overwritten).

        Raises `RuntimeError` when a peer has left (`TensorError` where one tensor is at fault), `TimeoutError` when
        the deadline passes.
        """
        ...


class Group(Protocol):
    """Ranks that share a stream of broadcasts. Every rank issues the same broadcasts in the same order."""

    rank: int
    size: int
    low_priority: bool
    """Poll rarely and use copy engines, because an engine decodes on this GPU and in this process."""

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> Work:
        """Start to copy every tensor (contiguous uint8, not empty) from rank `root` to all others. Collective.

        One grouped collective: both sides pass as many tensors, of the same sizes in the same order. Pass those that
        are broadcast again in the next sync as one `PersistentTensors`.
        """
        ...

    def ready(self) -> bool:
        """Return whether `broadcast` can start without waiting for the root. (Only some transports wait.)"""
        ...

    def unmap(self) -> None:
        """Unmap the peers' memory, if any is mapped here; later broadcasts map it again.

        No broadcast may be under way.
        """
        ...

    def close(self) -> None:
        """Leave the group. Idempotent. Peers that still wait for this rank fail at once instead of hanging."""
        ...
