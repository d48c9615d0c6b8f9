"""What can go wrong in a job besides the engines (trainer ranks)."""

from rollcast.rollout import RollcastError


class AgreementError(RollcastError):
    """Engine and trainer do not have the same weights: their log-probabilities of the same tokens differ."""
