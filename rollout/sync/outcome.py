"""The outcome of a step of a sync, and how trainer ranks agree on it (every trainer rank)."""

from collections.abc import Sequence

import msgspec

from rollcast.comm import Deadline
from rollcast.comm.agreement import Agreement
from rollcast.rollout.errors import EngineError, Failure, SyncError


class StepOutcome(msgspec.Struct, frozen=True):
    """What failed in a step, on one rank or on all of them together; nothing if it succeeded."""

    failures: tuple[Failure, ...] = ()
    message: str = ""
    """Text for the user."""

    @classmethod
    def of_error(cls, error: Exception, *, phase: str) -> "StepOutcome":
        """Return the outcome of a step that raised; errors of engines keep their own failures."""
        message = str(error) or type(error).__name__
        known = error.failures if isinstance(error, EngineError | SyncError) else ()
        failures = [msgspec.structs.replace(failure, phase=failure.phase or phase) for failure in known]
        return cls(tuple(failures) or (Failure(text=message, phase=phase),), message)

    def raise_failures(self) -> None:
        """Raise `SyncError` if anything failed."""
        if self.failures:
            raise SyncError(self.message, failures=self.failures)


def merge(outcomes: Sequence[StepOutcome]) -> StepOutcome:
    """Return the different failures of all ranks as one outcome."""
    failures = dict.fromkeys(failure for outcome in outcomes for failure in outcome.failures)
    messages = dict.fromkeys(outcome.message for outcome in outcomes if outcome.failures)
    return StepOutcome(tuple(failures), "\n".join(messages))


def agree_on(agreement: Agreement, topic: str, outcome: StepOutcome, *, deadline: Deadline) -> StepOutcome:
    """Return the outcome of a step over all trainer ranks. Collective.

    A rank that does not come in time is a failure, too. Every rank gets the same outcome.
    """
    verdict = agreement.decide(topic, outcome, merge, deadline=deadline)
    if verdict.value is None:
        return StepOutcome((Failure(text=verdict.error, phase="agree"),), verdict.error)
    return verdict.value
