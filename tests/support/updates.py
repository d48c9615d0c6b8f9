"""Weights that change, and what sends them (trainer)."""

from typing import Any

from models import perturb

import rollcast.rollout as rollcast


class Updates:
    """Changes the weights and sends them."""

    def __init__(self, job: rollcast.Job, model: Any) -> None:
        self.model = model
        self.version = 0
        self._broadcaster = job.broadcaster(model)
        # Later syncs are soon over.
        self._broadcaster.self_test()

    def make(self, **way: Any) -> None:
        perturb(self.model, seed=self.version + 1)
        self._broadcaster.sync(version=self.version + 1, **way)
        self.version += 1
