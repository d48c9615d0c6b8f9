"""A test's own process is terminated once something has happened."""

import os
import signal
import time
from pathlib import Path

TIMEOUT_S = 120


def terminate_when(path: Path) -> None:
    """Send this process SIGTERM once the file is there."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if path.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.05)
