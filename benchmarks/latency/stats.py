"""Statistics of repeated measurements, as rows of the result (trainer, and the command)."""

import random
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from latency.bench import Sample
from latency.decode import Stop

Row = dict[str, Any]
RAW_METHODS = ("raw-broadcast", "raw-ipc")


def percentile(values: Sequence[float], share: float) -> float:
    """Interpolate linearly between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interval_of_median(groups: Sequence[Sequence[float]]) -> list[float]:
    """Return a 95 % confidence interval of the median of all values.

    Efron's bootstrap (1979) in two stages, because the values of a group are correlated: it draws groups, then values
    of each, with replacement. With a single group the interval says nothing about other groups.
    """
    draw = random.Random(0).choices
    medians_of_draws = [
        statistics.median(value for group in draw(groups, k=len(groups)) for value in draw(group, k=len(group)))
        for _ in range(2000)
    ]
    return [percentile(medians_of_draws, share) for share in (0.025, 0.975)]


def summary(samples: Sequence[Sample], nbytes: int) -> Row:
    """Return a row's times."""
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
    """Return a row's effect on decoding."""
    return {
        "decode_stop_s": statistics.median(stop.stop_s for stop in stops),
        "decode_stop_max_s": max(stop.stop_s for stop in stops),
        "decode_gap_s": statistics.median(stop.gap_s for stop in stops),
        "decode_step_s": statistics.median(stop.step_s for stop in stops),
        "tokens_per_s": medians(stop.tokens_per_s for stop in stops),
    }


def medians(records: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the median of each key."""
    gathered: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            gathered.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in gathered.items()}


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Add each row's time divided by that of a raw broadcast of as many bytes; None if that was not measured.

    Both are of one model and, where there are layouts, of one layout.
    """
    rows = list(rows)
    raw = {_subject(row): row["p50_s"] for row in rows if row["method"] in RAW_METHODS and "p50_s" in row}
    return [row if "error" in row else row | {"ratio_to_raw": _ratio(row, raw.get(_subject(row)))} for row in rows]


def _subject(row: Row) -> tuple[str, str | None]:
    return row["model"], row.get("layout")


def _ratio(row: Row, raw_s: float | None) -> float | None:
    return None if raw_s is None else row["p50_s"] / raw_s
