"""Errors by who has to act, and the record of a failure that they carry (every process)."""

from collections.abc import Sequence

import msgspec


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One failure, in the same form from the worker that raised to the error that a trainer catches."""

    text: str
    """What the process that failed said itself."""
    engine: int | None = None
    """Index of the engine; None where no engine is to blame (a trainer rank, the job's store)."""
    worker: int | None = None
    """Rank of the worker in its engine; None where it was not a worker."""
    phase: str = ""
    """What was under way. Of an engine's life: "start", "run". Of a sync: "prepare", "plan", "join", "verify",
    "receive", "send", "agree", "commit", "finalize", "abort". Of a call of the pool: "generate", "describe",
    "fingerprint", "call", "sleep", "wake_up". Empty where the connection to the engine ended, or no reply came in
    time."""

    def __str__(self) -> str:
        places = [f"engine {self.engine}"] if self.engine is not None else []
        places += [f"worker {self.worker}"] if self.worker is not None else []
        return ": ".join([", ".join(places), self.text]) if places else self.text


class RollcastError(RuntimeError):
    """Base of all errors that a running job raises."""


class PreflightError(RollcastError, ValueError):
    """The job cannot work as it was started; found before any engine starts."""


class _FailureError(RollcastError):
    """An error with the failures that caused it, each with engine, worker rank, phase and text."""

    def __init__(self, message: str = "", *, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message or "\n".join(dict.fromkeys(map(str, failures))))
        self.failures = tuple(failures)

    @property
    def engine(self) -> int | None:
        """Engine of the first failure."""
        return self.failures[0].engine if self.failures else None

    @property
    def worker(self) -> int | None:
        """Worker rank, in its engine, of the first failure."""
        return self.failures[0].worker if self.failures else None

    @property
    def phase(self) -> str:
        """What was under way at the first failure."""
        return self.failures[0].phase if self.failures else ""


class EngineError(_FailureError):
    """An engine failed, died or refused. Has the engine's own text."""


class SyncError(_FailureError):
    """A sync failed: no engine serves the new version. The next sync sends everything again."""


class OrchestratorError(RollcastError):
    """Another trainer rank's generate or train failed (its own text), or ranks or engines are out of step."""


class LandingError(RollcastError):
    """The engine's model cannot take the weights; names the parameters."""
