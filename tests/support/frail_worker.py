"""A slow worker whose next sync can be made to fail."""

from typing import Any

from slow_worker import SlowWorker

from rollcast.rollout.worker import WorkerSync


class FrailSync(WorkerSync):
    """Raises in the next `receive` when `fails_next` is set."""

    fails_next = False

    def receive(self, **arguments: Any) -> dict[str, dict[str, Any]]:
        if self.fails_next:
            self.fails_next = False
            self.leave()
            raise RuntimeError("the worker stumbled")
        return super().receive(**arguments)


class FrailWorker(SlowWorker):
    rollcast_sync_class = FrailSync

    def fail_next_sync(self) -> None:
        """Raise in the receive of the next sync."""
        assert isinstance(self.rollcast_sync, FrailSync)
        self.rollcast_sync.fails_next = True
