"""A trainer rank of a shared job other than rank 0, which is pytest: makes the calls that arrive at a socket (a child).

trainer_rank.py CONFIG_PICKLE MODEL_KIND SOCKET
"""

import pickle
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path

from shapes import MODELS
from trainer import Trainer

import rollcast.rollout as rollcast


def main() -> None:
    config = pickle.loads(Path(sys.argv[1]).read_bytes())
    with rollcast.join(config) as job:
        serve(job, MODELS[sys.argv[2]](), sys.argv[3])


def serve(job: rollcast.Job, model: object, address: str) -> None:
    """Answer (result, None) or (None, traceback) to every call; None ends the loop, and "abandon" the process."""
    with Client(address) as connection:
        connection.send(job.trainer_rank)
        trainer = Trainer(job, model)
        while (call := connection.recv()) is not None:
            if call == "abandon":
                raise SystemExit("the job is abandoned")
            function, arguments = call
            try:
                connection.send((function(trainer, *arguments), None))
            except Exception:
                connection.send((None, traceback.format_exc()))
        trainer.close()


if __name__ == "__main__":
    main()
