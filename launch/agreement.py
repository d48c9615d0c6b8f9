"""Whether the engines have the trainers' weights: log-probabilities of the same tokens, compared (trainer ranks)."""

import math
from dataclasses import dataclass

import torch

from rollcast.launch.errors import AgreementError
from rollcast.launch.parallel import Trainers


@dataclass(frozen=True, slots=True)
class Agreement:
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
) -> Agreement:
    """What `policy.logprob_diffs` has found, taken together. Collective.

    `differences`: float32 [tokens]; `owners`: int64 [tokens], which of the `engines` made each. Each engine counts by
    itself: one that is behind must not vanish among many that are not. Raises `AgreementError` on every trainer when
    an engine's average is more than `tolerance`.
    """
    zeros = torch.zeros(engines, dtype=torch.float64, device=differences.device)
    sums = trainers.sum(zeros.index_add(0, owners, differences.double()).tolist())
    counts = trainers.sum(torch.bincount(owners, minlength=engines).tolist())
    averages = {engine: sums[engine] / count for engine, count in enumerate(counts) if count}
    largest = trainers.max(differences.max().item() if len(differences) else 0.0)
    if not averages:
        return Agreement()
    worst = max(averages, key=averages.__getitem__)
    if not averages[worst] <= tolerance or averages[worst] == math.inf:
        raise AgreementError(
            f"engine and trainer log-probabilities differ by {averages[worst]:.2e} on average, more than "
            f"{tolerance:.0e}: the weights of engine {worst} are not the trainer's version {version}"
        )
    return Agreement(averages[worst], largest)
