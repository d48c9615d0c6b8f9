"""A worker that returns the contents of its LoRA slots."""

from slow_worker import SlowWorker

from rollcast.rollout.landing.lora import stacks


class LoraWorker(SlowWorker):
    def show_slots(self) -> dict[str, list]:
        """Return every stack, slot by slot, as nested lists."""
        return {name: stack[:, 0].tolist() for name, stack in stacks(self.rollcast_sync.model.module).items()}
