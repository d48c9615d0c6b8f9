"""Rows of the benchmark's layouts as a table (the command's process)."""

from typing import Any

from latency.cells import error_cell, timing_cells
from latency.stats import Row

LAYOUT_COLUMNS = (
    "model",
    "layout",
    "method",
    "p50 ms",
    "p95 ms",
    "max ms",
    "GB/s",
    "x raw",
    "repeats",
    "gathered GB",
    "extra GB",
    "note",
)


def has_layouts(document: dict[str, Any]) -> bool:
    """Return whether a document is one of layouts."""
    return any("layout" in row for row in document["results"])


def layout_cells(row: Row) -> list[str]:
    """Return a row as text, in the order of `LAYOUT_COLUMNS`."""
    head = [row["model"], row["layout"], row["method"]]
    if "error" in row:
        return [*head, *[""] * (len(LAYOUT_COLUMNS) - 4), error_cell(row)]
    extra = row.get("peak_extra_bytes")
    memory = [f"{row['gathered_bytes'] / 1e9:.2f}", "" if extra is None else f"{extra / 1e9:.2f}"]
    note = "" if row.get("correct", True) else f"wrong weights: {row['problem']}"
    return [*head, *timing_cells(row), *memory, note]
