"""A worker whose steps can be slowed down, so that a test meets a step half way on any machine."""

import time
from typing import Any

from rollcast.rollout.worker import RollcastWorker


class SlowWorker(RollcastWorker):
    def slow_down(self, step_s: float) -> None:
        """Sleep `step_s` before each step from now on. Call it once."""
        worker: Any = self
        execute = worker.execute_model

        def execute_slowly(*arguments: Any, **options: Any) -> Any:
            time.sleep(step_s)
            return execute(*arguments, **options)

        worker.execute_model = execute_slowly
