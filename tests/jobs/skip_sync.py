"""The main job with its third sync left out on purpose (run by torchrun, flags as the main job's)."""

import sys

from rollcast.comm import SyncReport
from rollcast.launch import grpo
from rollcast.launch.trainer import Grpo


class Forgetful(Grpo):
    """Pretends to have pushed version 3."""

    def sync(self, *, version: int) -> SyncReport:
        if version != 3:
            return super().sync(version=version)
        self.broadcaster.version = version
        return SyncReport(version, 0, {"total": 1e-9})


if __name__ == "__main__":
    import rollcast.launch.trainer as trainer

    trainer.Grpo = Forgetful
    sys.exit(grpo.main())
