"""The worker of shared jobs: tests set its pace and its faults."""

import os
import time
from typing import Any

from faulty import FaultySync

from rollcast.rollout.landing.lora import stacks
from rollcast.rollout.worker import RollcastWorker


class SteeredSync(FaultySync):
    """Fails once in the next switch to weights received in shadow, when set to."""

    switch_fails_after_s: float | None = None

    def apply(self, **arguments: Any) -> Any:
        if (delay_s := self.switch_fails_after_s) is not None:
            self.switch_fails_after_s = None
            time.sleep(delay_s)
            raise RuntimeError("the worker stumbled")
        return super().apply(**arguments)


class SteeredWorker(RollcastWorker):
    """Can be slowed down and sped up again, and can be made to fail."""

    rollcast_sync_class = SteeredSync

    def set_pace(self, step_s: float) -> None:
        """Sleep `step_s` before each step from now on; 0 is full speed."""
        worker: Any = self
        if not hasattr(worker, "pace_s"):
            execute = worker.execute_model

            def execute_at_pace(*arguments: Any, **options: Any) -> Any:
                time.sleep(worker.pace_s)
                return execute(*arguments, **options)

            worker.execute_model = execute_at_pace
        worker.pace_s = step_s

    def pid(self) -> int:
        return os.getpid()

    def fail_next_switch(self, pid: int, delay_s: float) -> None:
        """Raise, after a delay, in the next switch to weights received in shadow, if `pid` is this worker's."""
        if pid == os.getpid():
            assert isinstance(self.rollcast_sync, SteeredSync)
            self.rollcast_sync.switch_fails_after_s = delay_s

    def keep_q_norm(self) -> None:
        """Keep the parameter that `FaultySync` replaces."""
        worker: Any = self
        worker.kept_q_norm = self._q_norm.weight

    def restore_q_norm(self) -> None:
        """Put the kept parameter back."""
        worker: Any = self
        self._q_norm.weight = worker.kept_q_norm

    @property
    def _q_norm(self) -> Any:
        return self.rollcast_sync.model.module.get_submodule("model.layers.0.self_attn.q_norm")

    def lora_stacks(self) -> dict[str, list]:
        """Return every stack of LoRA weights, slot by slot, as nested lists."""
        return {name: stack[:, 0].tolist() for name, stack in stacks(self.rollcast_sync.model.module).items()}
