"""What can go wrong, by who has to act (every process)."""


class RollcastError(RuntimeError):
    """Base of all errors that a running job raises."""


class PreflightError(RollcastError, ValueError):
    """The job cannot work as it was started; found before any engine starts."""


class EngineError(RollcastError):
    """An engine failed, died or refused. Carries the engine's own words."""


class SyncError(RollcastError):
    """A sync failed: no engine got the new version. The next sync sends everything again."""


class OrchestratorError(RollcastError):
    """Another trainer rank's generate or train failed, in its own words, or the ranks or engines are out of step."""


class LandingError(RollcastError):
    """The engine's model cannot take these weights in place."""
