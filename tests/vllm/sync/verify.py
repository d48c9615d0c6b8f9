"""Self-tests, damaged bytes and many syncs on one engine (run by torchrun: 1 trainer, 1 engine).

verify.py MODEL_FOLDER REPORT.json
"""

import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from models import build, perturb

import rollcast.rollout as rollcast

FAULT = Path(os.environ["FAULT_FILE"])
SYNCS = 50
MODES = ("in_place", "shadow")


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder,
        enforce_eager=True,
        bucket_bytes=16384,
        worker_extension_cls="faulty.FaultyWorker",
        log_dir=folder,
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            report.write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    model = build("tied")
    broadcaster = job.broadcaster(model)
    found: dict[str, Any] = {}
    broadcaster.self_test()
    found["after self-test"] = state(job)
    broadcaster.sync(version=1, verify="checksum")
    perturb(model, seed=1)
    found["self-test of others"] = failure(broadcaster.self_test)
    found["after a failed self-test"] = state(job)
    broadcaster.sync(version=2, verify="full")
    found["after full"] = state(job)
    FAULT.write_text("flip")
    perturb(model, seed=2)
    found["flipped"] = failure(lambda: broadcaster.sync(version=3, verify="checksum"))
    found["after flipped"] = state(job)
    FAULT.write_text("flip after the checksum")
    found["flipped late"] = failure(lambda: broadcaster.sync(version=4, verify="full"))
    FAULT.write_text("")
    broadcaster.sync(version=5)
    found["mended"] = state(job)
    FAULT.write_text("flip")
    perturb(model, seed=4)
    found["flipped aside"] = failure(lambda: broadcaster.sync(version=6, mode="shadow", verify="checksum"))
    found["after flipped aside"] = [*state(job), len(job.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=3)))]
    broadcaster.sync(version=6, mode="shadow", verify="full")
    broadcaster.self_test()
    found["switched"] = state(job)
    job.pool.sleep()
    found["asleep"] = [failure(lambda: broadcaster.sync(version=7)), refusal(job)]
    job.pool.wake_up(["weights"])
    broadcaster.sync(version=7)
    found["half awake"] = refusal(job)
    job.pool.wake_up(["kv_cache"])
    found["awake"] = [*state(job), len(job.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=3)))]
    job.pool.sleep(level=2)
    job.pool.wake_up()
    found["dropped"] = refusal(job)
    broadcaster.sync(version=8)
    found["refilled"] = [*state(job), len(job.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=3)))]
    for version in range(9, 19):
        broadcaster.sync(version=version, mode=MODES[version % 2])
    found["before"] = resources(job)
    for version in range(19, 19 + SYNCS):
        perturb(model, seed=version % 3)
        broadcaster.sync(version=version, mode=MODES[version % 2])
    found["after"] = resources(job)
    return found


def failure(act: Callable[[], Any]) -> str:
    try:
        act()
    except rollcast.SyncError as error:
        return str(error)
    return "no error"


def refusal(job: rollcast.Job) -> str:
    try:
        job.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=3))
    except rollcast.EngineError as error:
        return str(error)
    return "served"


def state(job: rollcast.Job) -> list[Any]:
    (found,) = job.pool.describe()
    return [found.version, found.refusal is not None]


def resources(job: rollcast.Job) -> dict[str, list[int]]:
    """Of the trainer and of every process of the engine: threads, open files, resident bytes."""
    gc.collect()
    (engine,) = job.pool.describe()
    service = psutil.Process(engine.pid)
    processes = [psutil.Process(), service, *service.children(recursive=True)]
    return {
        "python_threads": [threading.active_count()],
        "threads": [process.num_threads() for process in processes],
        "files": [process.num_fds() for process in processes],
        "resident": [process.memory_info().rss for process in processes],
    }


if __name__ == "__main__":
    main()
