"""Numbers from repeats, and the rows that they make (trainer, and the command)."""

import random
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from latency.bench import Sample
from latency.decode import Stop

Row = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interval_of_median(groups: Sequence[Sequence[float]]) -> list[float]:
    """Bounds of the median of all values in 95 % of as many groups and values drawn from these, with replacement.

    Efron's bootstrap (1979), in two stages, as the values of a group have things in common: first groups, then values
    of each. From one group it says nothing of what others would be like.
    """
    draw = random.Random(0).choices
    found = [
        statistics.median(value for its in draw(groups, k=len(groups)) for value in draw(its, k=len(its)))
        for _ in range(2000)
    ]
    return [percentile(found, share) for share in (0.025, 0.975)]


def summary(samples: Sequence[Sample], nbytes: int) -> Row:
    """What a row says of the time."""
    seconds = [sample.seconds for sample in samples]
    p50 = statistics.median(seconds)
    return {
        "p50_s": p50,
        "p95_s": percentile(seconds, 0.95),
        "max_s": max(seconds),
        "min_s": min(seconds),
        "repeats": len(seconds),
        "phases_s": medians(sample.phases_s for sample in samples),
        "gb_per_s": nbytes / 1e9 / p50,
    }


def decode_summary(stops: Sequence[Stop]) -> Row:
    """What a row says of decoding."""
    return {
        "decode_stop_s": statistics.median(stop.stop_s for stop in stops),
        "decode_stop_max_s": max(stop.stop_s for stop in stops),
        "decode_gap_s": statistics.median(stop.gap_s for stop in stops),
        "decode_step_s": statistics.median(stop.step_s for stop in stops),
        "tokens_per_s": medians(stop.tokens_per_s for stop in stops),
    }


def medians(records: Iterable[dict[str, float]]) -> dict[str, float]:
    """Median of each key."""
    gathered: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            gathered.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in gathered.items()}


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """The rows with how many times a raw broadcast of as many bytes each took; None if that was not measured."""
    rows = list(rows)
    raw = {row["model"]: row["p50_s"] for row in rows if row["method"] == "raw-broadcast" and "p50_s" in row}
    return [row if "error" in row else row | {"ratio_to_raw": _ratio(row, raw.get(row["model"]))} for row in rows]


def _ratio(row: Row, raw_s: float | None) -> float | None:
    return None if raw_s is None else row["p50_s"] / raw_s
