"""One trainer rank of a shared job: the model that it has, and the broadcaster that sends it (trainer ranks)."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters import PROMPTS
from models import perturb

import rollcast.rollout as rollcast
from rollcast.comm import SyncReport
from rollcast.launch.grpo.parallel import Trainers

FAULT_FILE = "FAULT_FILE"
SHORT = rollcast.Sampling(max_tokens=12, ignore_eos=True, n=2)


@dataclass(frozen=True, kw_only=True)
class AtStart:
    """What the engines held and generated before the first sync."""

    fingerprints: list[list[dict[str, str]]]
    groups: list[list[rollcast.Completion]]
    """Completions of each of `adapters.PROMPTS`."""


class Trainer:
    """A trainer rank's side of a job that tests share. `reset` brings job and model into a known state."""

    def __init__(self, job: rollcast.Job, model: Any) -> None:
        self.job = job
        self.model = model
        self.group = Trainers(rank=job.trainer_rank, size=job.config.trainers, device=job.config.resolved_device())
        self.at_start = AtStart(fingerprints=self.pool.fingerprints(), groups=self.pool.generate(PROMPTS, SHORT))
        self.broadcaster = job.broadcaster(model)
        if job.config.lora_rank is None:
            # Against vLLM's own load, before anything of ours is in the engines. Later syncs are soon over.
            self.broadcaster.self_test()
        self._sends_model = True
        self._initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._updates = 0

    @property
    def pool(self) -> rollcast.Pool:
        return self.job.pool

    @property
    def rank(self) -> int:
        return self.job.trainer_rank

    @property
    def version(self) -> int:
        """The version that the engines serve, by the newest broadcaster."""
        return self.broadcaster.version

    def reset(self) -> None:
        """Sync the model's initial weights; no faults, full speed, nobody asleep. Collective."""
        self.set_fault("")
        if self.rank == 0:
            self.pool.wake_up()
            self.pool.call_workers("set_pace", 0.0)
        self.model.load_state_dict(self._initial)
        self._updates = 0
        if self.broadcaster.closed or not self._sends_model:
            self.broadcaster, self._sends_model = self.job.broadcaster(self.model), True
        self.sync()

    def sync(self, **options: Any) -> SyncReport:
        """Send the weights as they are, as the next version. Collective."""
        return self.broadcaster.sync(version=self.version + 1, **options)

    def update(self, **options: Any) -> SyncReport:
        """Change all weights, and send them as the next version. Collective."""
        self.perturb()
        return self.sync(**options)

    def perturb(self) -> None:
        """Change all weights, the same way on every rank."""
        self._updates += 1
        perturb(self.model, seed=self._updates)

    def open_broadcaster(self, weights: Any, **settings: Any) -> rollcast.PoolBroadcaster:
        """A broadcaster of other weights, or with other settings; it takes over until the next reset."""
        job = replace(self.job, config=replace(self.job.config, **settings))
        self.broadcaster, self._sends_model = job.broadcaster(weights), False
        return self.broadcaster

    def set_fault(self, fault: str) -> None:
        """What `FaultySync` does next (rank 0's call counts)."""
        if self.rank == 0:
            fault_file().write_text(fault)

    def pace(self, step_s: float) -> None:
        """How long each step of the engines lasts at least (rank 0's call counts)."""
        if self.rank == 0:
            self.pool.call_workers("set_pace", step_s)

    def barrier(self) -> None:
        """Wait for the other trainer ranks. Collective."""
        self.group.sum([0.0])

    def close(self) -> None:
        """Leave the trainers' process group."""
        self.group.close()


def fault_file() -> Path:
    """Where `FaultySync` looks."""
    return Path(os.environ[FAULT_FILE])
