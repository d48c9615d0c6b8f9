"""Syncs that fail while workers raise, hang or are killed, with the model sharded (every trainer rank)."""

import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

from models import build, perturb
from states import sync_problem
from trainer import Trainer, fault_file

import rollcast.rollout as rollcast

LOST = re.compile(r"engine 0: lost.*(Worker|died|EngineDead)", re.DOTALL)
LOST_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a sync failed on this rank."""

    problem: str
    after_s: float


@dataclass(frozen=True, kw_only=True)
class Survived:
    """A sync that failed, and what came after it."""

    failure: Failure
    refusal: str
    """The error of a request then."""
    version: int
    """The version of the next sync."""
    served: tuple[int, ...]
    """Versions of a completion after that."""


@dataclass(frozen=True, kw_only=True)
class Killed:
    """A sync in which a worker was killed, and a request after it."""

    failure: Failure
    refusal: str
    """The error of the request once the engine was known to be lost, or after a while."""


def open_sharded(trainer: Trainer, **settings: Any) -> rollcast.PoolBroadcaster:
    """A broadcaster of a model that is sharded over the trainers, after its first sync. Collective."""
    model = trainer.group.share(build("tied"), "fsdp2")
    broadcaster = trainer.open_broadcaster(model, **settings)
    trainer.sync()
    perturb(model, seed=1)
    return broadcaster


def fail_sync(trainer: Trainer) -> Failure:
    start = time.monotonic()
    problem = sync_problem(trainer.sync)
    return Failure(problem=problem, after_s=time.monotonic() - start)


def set_fault(trainer: Trainer, fault: str) -> None:
    trainer.barrier()
    trainer.set_fault(fault)
    trainer.barrier()


def survive_a_raise(trainer: Trainer) -> Survived:
    """A failed sync is an error on every rank, the engine refuses to serve, and the next sync succeeds."""
    open_sharded(trainer)
    set_fault(trainer, "raise")
    failure = fail_sync(trainer)
    trainer.barrier()
    refusal = refusal_of(trainer)
    trainer.barrier()
    set_fault(trainer, "")
    report = trainer.sync()
    (samples,) = trainer.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=2))
    return Survived(failure=failure, refusal=refusal, version=report.version, served=tuple(samples[0].versions))


def meet_a_hang(trainer: Trainer, timeout_s: float) -> Failure:
    """A worker hangs for ever."""
    open_sharded(trainer, sync_timeout_s=timeout_s)
    set_fault(trainer, "hang")
    return fail_sync(trainer)


def meet_a_kill(trainer: Trainer) -> Killed:
    """A worker is killed in the middle of a sync."""
    open_sharded(trainer)
    set_fault(trainer, "hang")
    if trainer.rank == 0:
        threading.Thread(target=kill_worker, daemon=True).start()
    failure = fail_sync(trainer)
    # The engine's end is reported after the sync's.
    end = time.monotonic() + LOST_S
    while not LOST.search(refusal := refusal_of(trainer)) and time.monotonic() < end:
        time.sleep(0.1)
    return Killed(failure=failure, refusal=refusal)


def refusal_of(trainer: Trainer) -> str:
    """Text of the error that a request raises; empty if it is served."""
    try:
        trainer.pool.generate([[5, 6]], rollcast.Sampling(max_tokens=2))
    except rollcast.EngineError as error:
        return str(error)
    return ""


def kill_worker() -> None:
    """Kill a worker half a second after it has begun to hang."""
    hanging = fault_file().with_name(f"{fault_file().name}.pid")
    while not hanging.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(int(hanging.read_text()), signal.SIGKILL)
