"""An engine rank of a shared job: serves until the job is over (a child of the pytest process).

engine_rank.py CONFIG_PICKLE

It imports nothing that a trainer needs: engines start when the slowest rank has joined.
"""

import pickle
import sys
from pathlib import Path

import rollcast.rollout as rollcast


def main() -> None:
    config = pickle.loads(Path(sys.argv[1]).read_bytes())
    with rollcast.join(config) as job:
        assert not job.is_trainer


if __name__ == "__main__":
    main()
