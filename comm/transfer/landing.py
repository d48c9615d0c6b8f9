"""The interface between comm and rollout: where received weights are written (vLLM worker)."""

from typing import Protocol

import torch


class VerifyError(RuntimeError):
    """Received bytes, or weights in memory, differ from what the trainer sent."""


class Landing(Protocol):
    """A worker's parameters, as a `WeightReceiver` writes them.

    The calls of one sync: `begin`, then the moves; `finish(stage)` after the last move of each stage; then `commit`.
    After an error at any point: `abort`.
    """

    def live(self, target: str) -> torch.Tensor:
        """Return the live tensor that moves without a stage write. Called once, when the receiver is made."""
        ...

    def staging(self, stage: int, target: str) -> torch.Tensor:
        """Return the tensor that the moves of a stage write. Valid until `finish(stage)`."""
        ...

    def begin(self, *, verifying: bool = False) -> None:
        """Begin a sync: the parameters may be written from now on.

        With `verifying` the same weights are received again: `finish` must not change parameters, and raises
        `VerifyError` for a stage whose processed weights differ from those in memory.
        """
        ...

    def finish(self, stage: int) -> None:
        """Process the module of a stage, all moves of which have arrived."""
        ...

    def commit(self) -> None:
        """Complete the sync, after everything has arrived."""
        ...

    def abort(self) -> None:
        """Drop what is unfinished of a sync that failed."""
        ...
