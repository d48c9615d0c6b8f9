"""The main job, sending old weights in its third sync (run by torchrun, flags of the main job)."""

import copy
import sys

from rollcast.comm import SyncReport
from rollcast.launch.grpo import __main__ as grpo
from rollcast.launch.grpo.trainer import Grpo


class StaleSync(Grpo):
    """Sends the weights of version 2 as version 3."""

    def sync(self, *, version: int) -> SyncReport:
        newest = copy.deepcopy(self.model.state_dict())
        if version == 3:
            self.model.load_state_dict(self.pushed)
        self.pushed = newest
        report = super().sync(version=version)
        self.model.load_state_dict(newest)
        return report


if __name__ == "__main__":
    import rollcast.launch.grpo.trainer as trainer

    trainer.Grpo = StaleSync
    sys.exit(grpo.main())
