"""Streams, aborts and mistakes with deterministic engines, on which requests wait for each other (run by torchrun).

deterministic.py MODEL_FOLDER REPORT.json      (2 trainers, each with a report of its own; an engine of two workers)
"""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from oracle import error_text

import rollcast.rollout as rollcast

PROMPTS = [[5, 6, 7], [9, 8, 3], [4, 4, 4]]
SAMPLED = rollcast.Sampling(max_tokens=16, n=2, ignore_eos=True)
SEEDED = rollcast.Sampling(max_tokens=16, seed=3)
STREAMED = rollcast.Sampling(max_tokens=40, ignore_eos=True)
# Aborted long before their end.
LONG = rollcast.Sampling(max_tokens=900, ignore_eos=True)
Tokens = list[list[list[int]]]
"""By prompt and sample."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a trainer rank has drawn, and what was refused, in the order in which it was asked for."""

    tokens: Tokens
    aborted: list[str | None]
    """Finish reasons of requests that waited for their turn, or ran, when all were aborted."""
    mistake: str
    """Error of a call that names two requests alike."""
    streamed: list[int]
    seeded: list[Tokens]
    """Two calls with a seed of the user's."""
    drawn: list[Tokens]
    """Two calls without."""
    async_mode: str
    """Error of an orchestrator that cannot be deterministic."""


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder, trainers=2, tensor_parallel_size=2, enforce_eager=True, log_dir=folder, deterministic=True
    )
    with rollcast.join(config) as job:
        if not job.is_trainer:
            return
        run = make_run(job)
    closed = error_text(lambda: job.pool.generate([[1]], rollcast.Sampling()))
    Path(f"{report}.{job.trainer_rank}").write_bytes(msgspec.json.encode({"run": run, "closed": closed}))


def make_run(job: rollcast.Job) -> Run:
    pool = job.pool
    tokens = tokens_of(pool.generate(PROMPTS, SAMPLED))
    futures = [pool.submit(prompt, LONG) for prompt in PROMPTS]
    # The others wait for the first.
    pool.abort()
    return Run(
        tokens=tokens,
        aborted=[future.result(60.0)[0].finish_reason for future in futures],
        mistake=error_text(lambda: pool.generate(PROMPTS, LONG, request_ids=["a", "b", "a"])),
        streamed=asyncio.run(read_stream(pool)),
        seeded=[tokens_of(pool.generate(PROMPTS, SEEDED)) for _ in range(2)],
        drawn=[tokens_of(pool.generate(PROMPTS, SAMPLED)) for _ in range(2)],
        async_mode=error_text(
            lambda: job.orchestrator(rollcast.async_(max_staleness=1), generate=nothing, train=nothing, sync=nothing)
        ),
    )


def nothing(_: Any) -> Any:
    return None


def tokens_of(groups: list[list[rollcast.Completion]]) -> Tokens:
    return [[sample.token_ids for sample in group] for group in groups]


async def read_stream(pool: rollcast.Pool) -> list[int]:
    return [token async for piece in pool.stream([5, 6, 7], STREAMED) for token in piece.token_ids]


if __name__ == "__main__":
    main()
