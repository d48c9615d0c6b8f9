"""Cells that the benchmark's tables share (the command's process)."""

from latency.stats import Row


def error_cell(row: Row) -> str:
    """Return why there are no numbers."""
    return row["error"].splitlines()[0].replace("|", "/")


def timing_cells(row: Row) -> list[str]:
    """Return median, 95th percentile and maximum in ms, decimal GB/s, the ratio to raw and the number of repeats."""
    times = [f"{row[key] * 1e3:.2f}" for key in ("p50_s", "p95_s", "max_s")]
    ratio = "" if row.get("ratio_to_raw") is None else f"{row['ratio_to_raw']:.2f}"
    return [*times, f"{row['gb_per_s']:.1f}", ratio, str(row["repeats"])]
