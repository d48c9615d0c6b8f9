"""A worker that shows its LoRA slots."""

from rollcast.rollout.adapters import stacks
from rollcast.rollout.extension import RollcastWorker


class LoraWorker(RollcastWorker):
    def show_slots(self) -> dict[str, list]:
        """Every stack, slot by slot, as nested lists."""
        return {name: stack[:, 0].tolist() for name, stack in stacks(self._rollcast_model()).items()}
