"""Let Ctrl-C and SIGTERM end a rank soon, whatever it waits for (trainer ranks)."""

import os
import signal
import threading
import time
from types import FrameType

GRACE_S = 6.0


def end_soon_on_signals() -> None:
    """Raise `KeyboardInterrupt` on SIGINT and SIGTERM, and end the process if it is still there after `GRACE_S`.

    A Python handler only runs between bytecodes, so never while a collective waits in C++ for a rank that is
    gone. The signal itself writes to the wake-up pipe, and a thread reads it.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    threading.Thread(target=_end_after_signal, args=(read_fd,), name="interrupt", daemon=True).start()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the clean-up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def _end_after_signal(read_fd: int) -> None:
    while os.read(read_fd, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
        continue
    time.sleep(GRACE_S)
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # the live display hid the cursor
    os._exit(130)
