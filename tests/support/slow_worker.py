"""A worker whose steps can be made to last, so that what a test means to meet half way is met on any machine."""

import time
from typing import Any

from rollcast.rollout.worker.extension import RollcastWorker


class SlowWorker(RollcastWorker):
    def slow_down(self, step_s: float) -> None:
        """Sleep so long before each step from now on. Call it once."""
        worker: Any = self
        execute = worker.execute_model

        def execute_slowly(*arguments: Any, **more: Any) -> Any:
            time.sleep(step_s)
            return execute(*arguments, **more)

        worker.execute_model = execute_slowly
