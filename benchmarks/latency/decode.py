"""Time for which an update stops an engine that decodes (trainer)."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from latency.bench import Bench, Run, Sample
from rollcast.rollout import Sampling

PROMPT_TOKENS = 4
# Watched before and after every update: long enough for a rate, in steps and in seconds.
WINDOW_STEPS = 12
WINDOW_S = 0.15
STEADY_STEPS = 16
# Steps after an update that its last copy may delay.
LATE_STEPS = 3
START_TIMEOUT_S = 60.0
POLL_S = 0.05

Step = tuple[float, int]
"""End of a step, in seconds on the machine's clock, and the tokens that it decoded."""


@dataclass(frozen=True)
class Stop:
    """Effect of one update on decoding."""

    gap_s: float
    """Longest time between two steps that the update overlaps, or that end just after it."""
    step_s: float
    """Median time between two steps just before."""
    tokens_per_s: dict[str, float]
    """Before, during and after."""

    @property
    def stop_s(self) -> float:
        return max(self.gap_s - self.step_s, 0.0)


def updates_while_decoding(bench: Bench, run: Run, *, kv_cache_tokens: int) -> tuple[list[Sample], list[Stop]]:
    """Update repeatedly while `spec.decode` sequences decode; then abort them."""
    count = bench.spec.decode
    limit = min(bench.spec.rollout_config().resolved_max_model_len(), kv_cache_tokens // count or 1) - PROMPT_TOKENS
    sampling = Sampling(max_tokens=limit - 1, ignore_eos=True)
    prompts = [[1 + (index + place) % 500 for place in range(PROMPT_TOKENS)] for index in range(count)]
    bench.call("bench_watch")
    with ThreadPoolExecutor(1) as thread:
        try:
            running = thread.submit(bench.pool.generate, prompts, sampling)
            updates = _update(bench, run, running, pause_s=_wait_until_steady(bench, running, count))
            # The sequences are longer than the updates take.
            bench.pool.abort()
            running.result()
        finally:
            steps = [(start, tokens) for start, tokens in bench.call("bench_unwatch")]
    stops = [_stop(steps, start, end, pause_s) for start, end, pause_s, _ in updates]
    return [sample for *_, sample in updates], stops


def _wait_until_steady(bench: Bench, running: "Future[Any]", count: int) -> float:
    """Wait until every step decodes one token of each sequence; return how long to watch around an update."""
    end = time.perf_counter() + START_TIMEOUT_S
    while time.perf_counter() < end and not running.done():
        time.sleep(POLL_S)
        steps: list[Step] = bench.call("bench_last_steps", STEADY_STEPS)
        if len(steps) == STEADY_STEPS and all(tokens == count for _, tokens in steps):
            return max(WINDOW_S, WINDOW_STEPS * (steps[-1][0] - steps[0][0]) / (STEADY_STEPS - 1))
    if running.done():
        running.result()
    raise RuntimeError(f"{count} sequences do not decode together: the KV cache is too small, or they end too soon")


def _update(
    bench: Bench, run: Run, running: "Future[Any]", *, pause_s: float
) -> list[tuple[float, float, float, Sample]]:
    """Return start, end, watched time and sample of every update that ended before the requests did."""
    updates: list[tuple[float, float, float, Sample]] = []
    end = time.perf_counter() + bench.spec.max_seconds
    time.sleep(pause_s)
    while len(updates) < bench.spec.repeats and (not updates or time.perf_counter() < end):
        bench.negate()
        start = time.perf_counter()
        sample = run()
        update = start, time.perf_counter(), pause_s, sample
        time.sleep(pause_s)
        if running.done():
            break
        updates.append(update)
    if not updates:
        raise RuntimeError("the sequences ended before one update did: the KV cache is too small")
    return updates


def _stop(steps: Sequence[Step], start: float, end: float, window_s: float) -> Stop:
    """Return the effect of an update from `start` to `end`."""
    pairs = list(pairwise(at for at, _ in steps))
    before = [later - at for at, later in pairs if start - window_s <= at and later <= start]
    step_s = statistics.median(before) if before else 0.0
    around = [later - at for at, later in pairs if later > start and at < end + LATE_STEPS * step_s]
    rates = {
        "before": _rate(steps, start - window_s, start),
        "during": _rate(steps, start, end),
        "after": _rate(steps, end, end + window_s),
    }
    return Stop(max(around, default=0.0), step_s, rates)


def _rate(steps: Sequence[Step], start: float, end: float) -> float:
    return sum(tokens for at, tokens in steps if start <= at < end) / (end - start)
