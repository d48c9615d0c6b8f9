"""A worker that fails inside the receive when a file says so."""

import os
import time
from pathlib import Path

from rollcast.rollout.extension import RollcastWorker


class FaultyWorker(RollcastWorker):
    """Reads what to do from the file named by FAULT_FILE: "raise", "hang" or nothing."""

    def rollcast_receive(self, version: int, digest: str, timeout_s: float) -> dict[str, float]:
        file = Path(os.environ["FAULT_FILE"])
        fault = file.read_text()
        if fault == "raise":
            try:
                raise RuntimeError(f"the worker dropped version {version} on the floor")
            finally:
                self.rollcast_leave()
        if fault == "hang":
            file.write_text(f"pid {os.getpid()}")
            time.sleep(3600)
        return super().rollcast_receive(version, digest, timeout_s)
