"""Generation of batches in the background, one thread each (trainer)."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from rollcast.comm import Deadline

logger = logging.getLogger(__name__)

# Less than the time that torchrun gives a trainer after Ctrl-C.
LEAVE_S = 3.0


class Versioned(Protocol):
    """A rank's part of a generated batch."""

    @property
    def oldest_version(self) -> int:
        """Policy version of its oldest token."""
        ...


Batch = TypeVar("Batch", bound=Versioned)


class BackgroundGeneration(Generic[Batch]):
    """Calls `generate(batch)` in threads; `cancel` ends the calls that are still running at the end.

    with BackgroundGeneration(generate, cancel) as generation:
        generation.start(0)
        generation.wait(timeout_s=1.0)
        generation.oldest()     # {0: 7}: batch 0 is generated, its oldest token is of version 7
        generation.take(0)
    """

    def __init__(self, generate: Callable[[int], Batch], cancel: Callable[[], None]) -> None:
        self._generate = generate
        self._cancel = cancel
        self._threads: dict[int, threading.Thread] = {}
        self._finished: dict[int, tuple[Batch, int]] = {}
        self._changed = threading.Condition()
        self._unseen = False
        self.error: BaseException | None = None
        """The first error that a call raised."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all threads; log those that do not end in time."""
        alive = [batch for batch, thread in self._threads.items() if thread.is_alive()]
        if alive:
            self._cancel()
        deadline = Deadline(LEAVE_S)
        for batch in alive:
            self._threads[batch].join(deadline.left_s())
            if self._threads[batch].is_alive():
                logger.warning("generating batch %d did not end within %g s", batch, LEAVE_S)

    def start(self, batch: int) -> None:
        """Start to generate a batch."""
        # A daemon: a call that `cancel` cannot end must not keep the process alive.
        thread = threading.Thread(target=self._run, args=(batch,), name=f"rollcast-generate-{batch}", daemon=True)
        self._threads[batch] = thread
        thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait until a call has ended since the last `oldest`. Returns at once if no call is running."""
        with self._changed:
            self._changed.wait_for(lambda: self._unseen or len(self._finished) == len(self._threads), timeout_s)

    def oldest(self) -> dict[int, int]:
        """Return the batches that are generated and not taken, with the version of their oldest token."""
        with self._changed:
            self._unseen = False
            return {batch: oldest for batch, (_, oldest) in self._finished.items()}

    def take(self, batch: int) -> Batch:
        """Return a batch that is generated, and forget it."""
        self._threads.pop(batch).join()
        with self._changed:
            return self._finished.pop(batch)[0]

    def _run(self, batch: int) -> None:
        try:
            part = self._generate(batch)
            result = part, part.oldest_version
        except BaseException as error:
            with self._changed:
                self.error = self.error or error
                self._notify()
        else:
            with self._changed:
                self._finished[batch] = result
                self._notify()

    def _notify(self) -> None:
        self._unseen = True
        self._changed.notify()
