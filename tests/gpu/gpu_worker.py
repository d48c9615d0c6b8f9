"""A worker that reports how much GPU memory it uses."""

import torch

from rollcast.rollout.worker import RollcastWorker


class GpuWorker(RollcastWorker):
    """Adds the methods that the GPU tests call."""

    def memory(self) -> list[int]:
        """Return the bytes that torch has allocated, and reserved, in this process."""
        return [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]

    def fail_next(self) -> None:
        """Make the next receive raise before it takes a byte."""
        receiver = self.rollcast_sync.receiver
        assert receiver is not None
        receive = receiver.receive

        def fail(*_: object, **__: object) -> None:
            receiver.receive = receive
            raise RuntimeError("the worker was told to fail")

        receiver.receive = fail
