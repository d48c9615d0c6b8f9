"""Weights that change, and their syncs (trainer)."""

from typing import Any

from models import perturb

import rollcast.rollout as rollcast


class Updates:
    """Changes a model's weights and sends them as the next version."""

    def __init__(self, job: rollcast.Job, model: Any) -> None:
        self.model = model
        self.version = 0
        self._broadcaster = job.broadcaster(model)
        # Later syncs are soon over.
        self._broadcaster.self_test()

    def make(self, **options: Any) -> None:
        perturb(self.model, seed=self.version + 1)
        self._broadcaster.sync(version=self.version + 1, **options)
        self.version += 1
