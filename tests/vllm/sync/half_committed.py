"""A sync that one engine commits and the other does not, and one that is interrupted (1 trainer, 2 engines).

half_committed.py MODEL_FOLDER REPORT.json      (run by torchrun)
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from models import build, perturb
from oracle import distances, said
from slow_worker import SlowWorker

import rollcast.rollout as rollcast
from rollcast.rollout.sync.session import SyncSession

# Long enough for the other engine to commit, and to make what is asked of it.
STUMBLE_S = 4.0
STEP_S = 0.005
LONG = rollcast.Sampling(max_tokens=300, ignore_eos=True)
SHORT = rollcast.Sampling(max_tokens=8, ignore_eos=True)
PROMPTS = [[5 + index, 6, 7, 8] * 12 for index in range(4)]


class StumblingWorker(SlowWorker):
    """Fails at the switch to weights received aside, late, when told to."""

    def pid(self) -> int:
        return os.getpid()

    def stumble(self, pid: int) -> None:
        """In the next switch, if it is this worker's `pid`."""
        if pid != os.getpid():
            return

        def stumbling(**_: Any) -> None:
            del sync.apply
            time.sleep(STUMBLE_S)
            raise RuntimeError("the worker stumbled")

        sync: Any = self.rollcast_sync
        sync.apply = stumbling


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder,
        enforce_eager=True,
        worker_extension_cls="half_committed.StumblingWorker",
        log_dir=folder,
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    model = build("tied")
    broadcaster = job.broadcaster(model)
    broadcaster.sync(version=1)
    found: dict[str, Any] = {"before": served(job, model)}
    perturb(model, seed=1)
    job.pool.call_workers("slow_down", STEP_S)
    job.pool.call_workers("stumble", job.pool.call_workers("pid")[1][0])
    running = [job.pool.submit(prompt, LONG) for prompt in PROMPTS]
    found["half committed"] = said(lambda: broadcaster.sync(version=2, mode="shadow"))
    found["in flight"] = [said(future.result) for future in running]
    found["versions"] = [its.version for its in job.pool.describe()]
    found["asked"] = refusals(job)
    perturb(model, seed=2)
    # Engine 0 has nothing to serve meanwhile.
    broadcaster.sync(version=2, mode="shadow")
    found["mended"] = served(job, model)
    parts: Any = broadcaster
    interrupt(broadcaster, version=3, owner=parts._lanes, method="send")
    found["interrupted"] = refusals(job)
    broadcaster.sync(version=3)
    found["resumed"] = served(job, model)
    # All engines have committed, and none has heard of it.
    interrupt(broadcaster, version=4, owner=SyncSession, method="_finalize")
    found["late"] = [broadcaster.version, *served(job, model)]
    return found


def refusals(job: rollcast.Job) -> list[str]:
    """What is said to each prompt."""
    return [said(job.pool.submit(prompt, SHORT).result) for prompt in PROMPTS]


def served(job: rollcast.Job, model: Any) -> list[Any]:
    """By prompt: the engine, the versions, and the largest distance from transformers' log-probabilities."""
    groups = job.pool.generate(PROMPTS, SHORT)
    pairs = [(prompt, sample) for prompt, (sample,) in zip(PROMPTS, groups, strict=True)]
    return [[its.engine, its.versions, distances(model, prompt, its).max().item()] for prompt, its in pairs]


def interrupt(broadcaster: Any, *, version: int, owner: Any, method: str) -> None:
    """Raise KeyboardInterrupt in a sync, as Ctrl-C does, when it first calls `method` of `owner`, and catch it here."""
    original = getattr(owner, method)

    def interrupted(*_: Any, **__: Any) -> None:
        setattr(owner, method, original)
        time.sleep(0.5)
        raise KeyboardInterrupt

    setattr(owner, method, interrupted)
    try:
        broadcaster.sync(version=version)
    except KeyboardInterrupt:
        return
    raise AssertionError("nobody was interrupted")


if __name__ == "__main__":
    main()
