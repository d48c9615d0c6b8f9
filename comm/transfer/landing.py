"""Where what a worker receives goes (worker)."""

from typing import Protocol

import torch


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
