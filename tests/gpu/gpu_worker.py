"""A worker that tells how much GPU memory it has."""

import torch

from rollcast.rollout.worker.extension import RollcastWorker


class GpuWorker(RollcastWorker):
    """With what the GPU tests ask for."""

    def memory(self) -> list[int]:
        """Bytes that torch has allocated, and reserved, in this process."""
        return [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]

    def fail_next(self) -> None:
        """The next receive raises before it takes a byte."""
        receive = self.rollcast_receiver.receive

        def fail(*_: object, **__: object) -> None:
            self.rollcast_receiver.receive = receive
            raise RuntimeError("the worker was told to fail")

        self.rollcast_receiver.receive = fail
