"""Batches that are generated while something else goes on: one thread each (trainer)."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from rollcast.comm import Deadline

logger = logging.getLogger(__name__)

# Less than a trainer has after Ctrl-C.
LEAVE_S = 3.0


class Versioned(Protocol):
    """What a rank has generated for a batch."""

    @property
    def oldest_version(self) -> int:
        """Policy version of its oldest token."""
        ...


Batch = TypeVar("Batch", bound=Versioned)


class Background(Generic[Batch]):
    """Calls `generate(batch)` in threads; `cancel` ends the calls under way when nobody wants them any more.

    with Background(generate, cancel) as background:
        background.start(0)
        background.wait(timeout_s=1.0)
        background.oldest()     # {0: 7}: batch 0 is there, its oldest token is of version 7
        background.take(0)
    """

    def __init__(self, generate: Callable[[int], Batch], cancel: Callable[[], None]) -> None:
        self._generate = generate
        self._cancel = cancel
        self._threads: dict[int, threading.Thread] = {}
        self._made: dict[int, tuple[Batch, int]] = {}
        self._news = threading.Condition()
        self._untold = False
        self.error: BaseException | None = None
        """The first that a call raised."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave no thread behind, whatever happened."""
        alive = [batch for batch, thread in self._threads.items() if thread.is_alive()]
        if alive:
            self._cancel()
        deadline = Deadline(LEAVE_S)
        for batch in alive:
            self._threads[batch].join(deadline.left_s())
            if self._threads[batch].is_alive():
                logger.warning("generating batch %d did not end within %g s", batch, LEAVE_S)

    def start(self, batch: int) -> None:
        """Begin to generate a batch."""
        # A daemon, for a call that no `cancel` can end must not keep the process.
        thread = threading.Thread(target=self._run, args=(batch,), name=f"rollcast-generate-{batch}", daemon=True)
        self._threads[batch] = thread
        thread.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for news since the last `oldest`; not at all if no call is under way, for then there will be none."""
        with self._news:
            self._news.wait_for(lambda: self._untold or len(self._made) == len(self._threads), timeout_s)

    def oldest(self) -> dict[int, int]:
        """Of every batch that is there and was not taken: the version of its oldest token."""
        with self._news:
            self._untold = False
            return {batch: oldest for batch, (_, oldest) in self._made.items()}

    def take(self, batch: int) -> Batch:
        """Hand out a batch that is there."""
        self._threads.pop(batch).join()
        with self._news:
            return self._made.pop(batch)[0]

    def _run(self, batch: int) -> None:
        try:
            made = self._generate(batch)
            result = made, made.oldest_version
        except BaseException as error:
            with self._news:
                self.error = self.error or error
                self._tell()
        else:
            with self._news:
                self._made[batch] = result
                self._tell()

    def _tell(self) -> None:
        self._untold = True
        self._news.notify()
