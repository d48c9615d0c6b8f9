"""What becomes of a sync: its error if it failed, and the state of the engine behind it (any trainer rank)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer import Trainer

import rollcast.rollout as rollcast


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """The version that the only engine holds, and whether it refuses to serve it."""

    version: int
    refuses: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One sync, and the engine after it."""

    problem: str
    """Text of the `SyncError`; empty if there was none."""
    state: EngineState
    fingerprints: list[list[dict[str, str]]]


def sync_problem(act: Callable[[], Any]) -> str:
    """Text of the `SyncError` that a call raises; empty if it raises none."""
    try:
        act()
    except rollcast.SyncError as error:
        return str(error)
    return ""


def engine_state(trainer: Trainer) -> EngineState:
    (engine,) = trainer.pool.describe()
    return EngineState(version=engine.version, refuses=engine.refusal is not None)


def sync_with_fault(trainer: Trainer, fault: str, options: dict[str, Any]) -> Outcome:
    """Sync the weights as they are with a fault of `FaultySync`. Collective."""
    trainer.barrier()
    trainer.set_fault(fault)
    trainer.barrier()
    problem = sync_problem(lambda: trainer.sync(**options))
    trainer.barrier()
    trainer.set_fault("")
    trainer.barrier()
    return Outcome(problem=problem, state=engine_state(trainer), fingerprints=trainer.pool.fingerprints())


def sync_with_unseen_fault(trainer: Trainer, fault: str, options: dict[str, Any]) -> Outcome:
    """The same right behind another sync: no call has reached the workers in between. Collective."""
    trainer.sync()
    return sync_with_fault(trainer, fault, options)
