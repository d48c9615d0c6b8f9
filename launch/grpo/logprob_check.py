"""Whether the engines have the trainers' weights: log-probabilities of the same tokens, compared (trainer ranks)."""

import math
from dataclasses import dataclass

import torch

from rollcast.launch.grpo.parallel import Trainers
from rollcast.rollout import RollcastError

# Single tokens differ by much more than the average: an engine is judged as if so many of its tokens more had agreed.
SLACK_TOKENS = 50


@dataclass(frozen=True, slots=True)
class LogprobGap:
    """|trainer's - engine's log-probability| of the sampled tokens that were compared; None if there was none."""

    mean_diff: float | None = None
    """Average over an engine's tokens, of the engine that differs most."""
    max_diff: float | None = None
    """Of one token."""


def judge(
    differences: torch.Tensor,
    owners: torch.Tensor,
    trainers: Trainers,
    *,
    engines: int,
    tolerance: float,
    version: int,
) -> LogprobGap:
    """What `policy.logprob_diffs` has found, taken together. Collective.

    `differences`: float32 [tokens]; `owners`: int64 [tokens], which of the `engines` made each. Each engine counts by
    itself: one that is behind must not vanish among many that are not. Raises `AgreementError` on every trainer when
    an engine's average is more than `tolerance`, by more than a few single tokens could explain.
    """
    zeros = torch.zeros(engines, dtype=torch.float64, device=differences.device)
    sums = trainers.sum(zeros.index_add(0, owners, differences.double()).tolist())
    counts = trainers.sum(torch.bincount(owners, minlength=engines).tolist())
    largest = trainers.max(differences.max().item() if len(differences) else 0.0)
    found = [engine for engine in range(engines) if counts[engine]]
    for engine in found:
        if not sums[engine] <= tolerance * (counts[engine] + SLACK_TOKENS) or sums[engine] == math.inf:
            raise AgreementError(
                f"engine and trainer log-probabilities differ by {sums[engine] / counts[engine]:.2e} on average, more "
                f"than {tolerance:.0e}: the weights of engine {engine} are not the trainer's version {version}"
            )
    return LogprobGap(max(sums[engine] / counts[engine] for engine in found), largest) if found else LogprobGap()


class AgreementError(RollcastError):
    """Engine and trainer do not have the same weights: their log-probabilities of the same tokens differ."""
