"""Syncs that fail: a worker that raises, then one that is killed or hangs for ever (run by torchrun).

faults.py MODEL_FOLDER kill|hang TIMEOUT_S      (2 trainers, 1 engine)
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from models import build, perturb
from torch import distributed as dist

import rollcast.rollout as rollcast
from rollcast.launch.grpo.parallel import Trainers

FAULT = Path(os.environ["FAULT_FILE"])


def main() -> None:
    folder, ending, timeout_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    config = rollcast.RolloutConfig(
        model=folder,
        trainers=2,
        enforce_eager=True,
        sync_timeout_s=timeout_s,
        worker_extension_cls="faulty.FaultyWorker",
        log_dir=folder,
    )
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        group = Trainers(rank=job.trainer_rank, size=2, device="cpu")
        model = group.share(build("tied"), "fsdp2")
        broadcaster = job.broadcaster(model)
        broadcaster.sync(version=1)
        dist.barrier()
        if ending == "kill":
            survive_a_raise(job, broadcaster, model)
        set_fault(job, "hang")
        if ending == "kill" and job.trainer_rank == 0:
            threading.Thread(target=kill_worker, daemon=True).start()
        start = time.monotonic()
        try:
            broadcaster.sync(version=9)
        except rollcast.SyncError as error:
            tell(job, f"raised after {time.monotonic() - start:.1f} s: {error}")
            raise


def survive_a_raise(job: rollcast.Job, broadcaster: rollcast.PoolBroadcaster, model: object) -> None:
    """A failed sync is an error on every rank, the engine refuses to serve, and the next sync mends it."""
    set_fault(job, "raise")
    perturb(model, seed=1)  # type: ignore[arg-type]
    start = time.monotonic()
    try:
        broadcaster.sync(version=2)
    except rollcast.SyncError as error:
        tell(job, f"first failure after {time.monotonic() - start:.1f} s: {error}")
    dist.barrier()
    try:
        job.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=2))
    except rollcast.EngineError as error:
        tell(job, f"refused: {error}")
    set_fault(job, "")
    report = broadcaster.sync(version=3)
    (samples,) = job.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=2))
    tell(job, f"mended: version {report.version}, completion of versions {samples[0].versions}")
    dist.barrier()


def set_fault(job: rollcast.Job, fault: str) -> None:
    dist.barrier()
    if job.trainer_rank == 0:
        FAULT.write_text(fault)
    dist.barrier()


def kill_worker() -> None:
    while not FAULT.read_text().startswith("pid"):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(int(FAULT.read_text().split()[1]), signal.SIGKILL)


def tell(job: rollcast.Job, text: str) -> None:
    print(f"<{job.trainer_rank}> {text}", flush=True)


if __name__ == "__main__":
    main()
