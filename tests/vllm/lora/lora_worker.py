"""A worker that shows its LoRA slots."""

from slow_worker import SlowWorker

from rollcast.rollout.landing.lora import stacks


class LoraWorker(SlowWorker):
    def show_slots(self) -> dict[str, list]:
        """Every stack, slot by slot, as nested lists."""
        return {name: stack[:, 0].tolist() for name, stack in stacks(self._rollcast_model()).items()}
