"""Requests that a sync meets half way, and refusals (every trainer rank, each with requests of its own)."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from oracle import distances, error_text
from trainer import Trainer

import rollcast.rollout as rollcast

LENGTH = 200
STEP_S = 0.005
PROMPTS = [[5, 6, 7], [9, 8, 3], [4, 4, 4]]
# The same on every rank.
NAMES = ["a", "b", "c"]


@dataclass(frozen=True, kw_only=True)
class AroundCut:
    """Distances of a sample's log-probabilities from those of the old and of the new weights."""

    old_before: float
    """Largest, from the old weights', of the tokens before the cut."""
    old_behind: float
    """From the old weights', of the token right behind it."""
    new_behind: float
    """Largest, from the new weights' in one pass over all tokens, of those behind."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion that was in flight when a sync came, or that was made soon after."""

    tokens: int
    logprobs: int
    finish_reason: str | None
    versions: list[int]
    cut: AroundCut | None
    """None if it has tokens of one version only."""


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """What calls raise that cannot work."""

    replaced: str
    not_newer: str
    unknown_mode: str
    newer_version: int
    long_prompt: str


def sync_in_flight(trainer: Trainer, options: dict[str, str]) -> list[Sample]:
    """Long requests that a sync meets half way, one batch after the other until it is over. Collective."""
    trainer.pace(STEP_S)
    trainer.barrier()
    synced, old = threading.Event(), copy.deepcopy(trainer.model)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(generate_until, trainer.pool, synced)
        try:
            # They have arrived by then, and are far from done on any machine.
            time.sleep(0.3)
            trainer.update(**options)
        finally:
            synced.set()
        return [
            Sample(
                tokens=len(sample.token_ids),
                logprobs=len(sample.logprobs),
                finish_reason=sample.finish_reason,
                versions=[version for version, _ in sample.spans],
                cut=around_cut(old, trainer.model, prompt, sample),
            )
            for prompt, sample in running.result()
        ]


def generate_until(pool: rollcast.Pool, synced: threading.Event) -> list[tuple[list[int], rollcast.Completion]]:
    sampling = rollcast.Sampling(max_tokens=LENGTH, ignore_eos=True, n=4)
    pairs: list[tuple[list[int], rollcast.Completion]] = []
    while not pairs or not synced.is_set():
        groups = pool.generate(PROMPTS, sampling, request_ids=NAMES)
        pairs += [(prompt, sample) for prompt, group in zip(PROMPTS, groups, strict=True) for sample in group]
    return pairs


def around_cut(old: Any, new: Any, prompt: list[int], sample: rollcast.Completion) -> AroundCut | None:
    if len(sample.spans) < 2:
        return None
    cut = sample.spans[1][1]
    old_distances, new_distances = distances(old, prompt, sample), distances(new, prompt, sample)
    return AroundCut(
        old_before=old_distances[:cut].max().item(),
        old_behind=old_distances[cut].item(),
        new_behind=new_distances[cut:].max().item(),
    )


def distances_after_switch(trainer: Trainer) -> list[float]:
    """Distances from the new weights of prompts whose keys and values the old weights have cached. Collective."""
    for _ in range(2):
        trainer.pool.generate(PROMPTS, rollcast.Sampling(max_tokens=16, ignore_eos=True))
    trainer.update()
    groups = trainer.pool.generate(PROMPTS, rollcast.Sampling(max_tokens=16, ignore_eos=True))
    return [
        distances(trainer.model, prompt, sample).max().item() for prompt, (sample,) in zip(PROMPTS, groups, strict=True)
    ]


def refusals(trainer: Trainer) -> Refusals:
    """Collective."""
    older, version = trainer.broadcaster, trainer.version
    newer = trainer.open_broadcaster(trainer.model)
    return Refusals(
        replaced=error_text(lambda: older.sync(version=version + 3)),
        not_newer=error_text(lambda: newer.sync(version=version)),
        unknown_mode=error_text(lambda: newer.sync(version=version + 1, pause_mode="never")),
        newer_version=newer.sync(version=version + 1).version,
        long_prompt=error_text(lambda: trainer.pool.generate([[1], [2] * 1024], rollcast.Sampling())),
    )
