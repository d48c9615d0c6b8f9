"""Streams, aborts and mistakes with deterministic engines, on which requests wait for each other (run by torchrun).

repeatable.py MODEL_FOLDER REPORT.json      (2 trainers, each with a report of its own; an engine of two workers)
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from oracle import said

import rollcast.rollout as rollcast

PROMPTS = [[5, 6, 7], [9, 8, 3], [4, 4, 4]]
SAMPLED = rollcast.Sampling(max_tokens=40, n=2, ignore_eos=True)
LONG = rollcast.Sampling(max_tokens=900, ignore_eos=True)


def main() -> None:
    folder, report = sys.argv[1], Path(sys.argv[2])
    config = rollcast.RolloutConfig(
        model=folder, trainers=2, tensor_parallel_size=2, enforce_eager=True, log_dir=folder, deterministic=True
    )
    with rollcast.join(config) as job:
        if job.is_trainer:
            Path(f"{report}.{job.trainer_rank}").write_text(json.dumps(facts(job)))


def facts(job: rollcast.Job) -> dict[str, Any]:
    pool = job.pool
    found: dict[str, Any] = {"tokens": tokens(pool.generate(PROMPTS, SAMPLED))}
    futures = [pool.submit(prompt, LONG) for prompt in PROMPTS]
    # The others wait for the first.
    pool.abort()
    found["aborted"] = [future.result(60.0)[0].finish_reason for future in futures]
    found["mistake"] = said(lambda: pool.generate(PROMPTS, LONG, request_ids=["a", "b", "a"]))
    found["streamed"] = asyncio.run(streamed(pool))
    found["seeded"] = [tokens(pool.generate(PROMPTS, rollcast.Sampling(max_tokens=40, seed=3))) for _ in range(2)]
    found["drawn"] = [tokens(pool.generate(PROMPTS, SAMPLED)) for _ in range(2)]
    found["async"] = said(
        lambda: job.orchestrator(rollcast.async_(max_staleness=1), generate=nothing, train=nothing, sync=nothing)
    )
    return found


def nothing(_: Any) -> Any:
    return None


def tokens(groups: list[list[rollcast.Completion]]) -> list[list[list[int]]]:
    return [[its.token_ids for its in group] for group in groups]


async def streamed(pool: rollcast.Pool) -> list[int]:
    return [token async for piece in pool.stream([5, 6, 7], LONG) for token in piece.token_ids]


if __name__ == "__main__":
    main()
