"""Check that engines have the trainers' weights, by log-probabilities of the same tokens (trainer ranks)."""

import math
from dataclasses import dataclass

import torch

from rollcast.launch.grpo.parallel import Trainers
from rollcast.rollout import RollcastError

# Single tokens differ by much more than the average: this many tokens without a difference are added to each engine's.
SLACK_TOKENS = 50


@dataclass(frozen=True, slots=True)
class LogprobGap:
    """|trainer's - engine's log-probability| of sampled tokens; None if no token was compared."""

    mean_diff: float | None = None
    """Average over the tokens of one engine, the one that differs most."""
    max_diff: float | None = None
    """Largest difference of a token."""


def check_logprobs(
    differences: torch.Tensor,
    owners: torch.Tensor,
    trainers: Trainers,
    *,
    engines: int,
    tolerance: float,
    version: int,
) -> LogprobGap:
    """Compare the average of each engine with `tolerance`. Collective over the trainers.

    `differences`: float32 [tokens], from `policy.logprob_diffs`; `owners`: int64 [tokens], their engines.
    Engines are checked one by one: one with old weights must not disappear in the average of many. Raises
    `LogprobError` on every trainer if an engine's average is larger than `tolerance`, by more than a few single tokens
    explain.
    """
    zeros = torch.zeros(engines, dtype=torch.float64, device=differences.device)
    sums = trainers.sum(zeros.index_add(0, owners, differences.double()).tolist())
    counts = trainers.sum(torch.bincount(owners, minlength=engines).tolist())
    largest = trainers.max(differences.max().item() if len(differences) else 0.0)
    compared = [engine for engine in range(engines) if counts[engine]]
    for engine in compared:
        if not sums[engine] <= tolerance * (counts[engine] + SLACK_TOKENS) or sums[engine] == math.inf:
            raise LogprobError(
                f"engine and trainer log-probabilities differ by {sums[engine] / counts[engine]:.2e} on average, more "
                f"than {tolerance:.0e}: the weights of engine {engine} are not the trainer's version {version}"
            )
    if not compared:
        return LogprobGap()
    return LogprobGap(max(sums[engine] / counts[engine] for engine in compared), largest)


class LogprobError(RollcastError):
    """Engine and trainer have different weights: their log-probabilities of the same tokens differ."""
