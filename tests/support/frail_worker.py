"""A slow worker that can be told to fail."""

from typing import Any

from slow_worker import SlowWorker


class FrailWorker(SlowWorker):
    def fail_next_sync(self) -> None:
        """Raise in the receive of the next sync."""

        def fail(*arguments: Any) -> None:
            del self.rollcast_receive
            self.rollcast_leave()
            raise RuntimeError("the worker stumbled")

        worker: Any = self
        worker.rollcast_receive = fail
