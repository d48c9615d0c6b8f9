"""Tables of the latency benchmark's results, for the terminal and in Markdown (the command's process)."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from latency.cells import error_cell, timing_cells
from latency.layout_table import LAYOUT_COLUMNS, has_layouts, layout_cells
from latency.stats import Row

COLUMNS = (
    "model",
    "method",
    "p50 ms",
    "p95 ms",
    "max ms",
    "GB/s",
    "x raw",
    "repeats",
    "decoding stops ms",
    "extra GB",
    "note",
)
TEXTS = ("model", "layout", "method", "note")


def columns_of(document: dict[str, Any]) -> tuple[Sequence[str], Callable[[Row], list[str]]]:
    """Return the columns of the document's table, and what makes the cells of a row."""
    return (LAYOUT_COLUMNS, layout_cells) if has_layouts(document) else (COLUMNS, cells)


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of `COLUMNS`."""
    if "error" in row:
        return [row["model"], label(row), *[""] * (len(COLUMNS) - 3), error_cell(row)]
    stop = f"{row['decode_stop_s'] * 1e3:.1f}" if "decode_stop_s" in row else ""
    wrong = "" if row.get("correct", True) else "the engine's weights are wrong"
    return [row["model"], label(row), *timing_cells(row), stop, extra_gb(row), wrong]


def label(row: Row) -> str:
    """Return the method, and how many sequences were decoding."""
    return row["method"] + (f", {row['decoding']} decoding" if "decoding" in row else "")


def extra_gb(row: Row) -> str:
    """Return the extra memory of engine and trainer."""
    extra = row.get("peak_extra_bytes")
    return f"{extra['engine'] / 1e9:.2f} + {extra['trainer'] / 1e9:.2f}" if extra else ""


def show(document: dict[str, Any]) -> None:
    """Print the table."""
    columns, cells_of = columns_of(document)
    table = Table(*columns)
    for row in document["results"]:
        table.add_row(*cells_of(row))
    Console(file=sys.stdout, width=170).print(table)


def markdown(document: dict[str, Any]) -> str:
    """Return the table in Markdown, with machine and versions."""
    machine, versions = document["machine"], document["versions"]
    gpus = f"{machine['gpu_count']} x {machine['gpus'][0]}, driver {machine['driver']}, " if "gpus" in machine else ""
    wire = f"NVLink: {'yes' if machine['nvlink'] else 'no'}, " if "gpus" in machine else ""
    commit = document["commit"].replace(document["commit"][12:40], "")
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    columns, cells_of = columns_of(document)
    lines = [
        f"{gpus}{wire}{machine['cpu']}; {software}; commit {commit}, {document['date']}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---' if name in TEXTS else '--:' for name in columns)}|",
    ]
    lines += [f"| {' | '.join(cells_of(row))} |" for row in document["results"]]
    return "\n".join([*lines, "", *ceiling_lines(document["ceilings"])])


def ceiling_lines(ceilings: dict[str, Any]) -> Iterator[str]:
    """Yield the ceilings of the machine."""
    if ceilings:
        wire = ", ".join(f"{row['gb_per_s']:.1f} at {row['bytes'] / 2**20:g} MiB" for row in ceilings["raw_broadcast"])
        yield f"Raw broadcast of one buffer, GB/s: {wire}."
        yield f"Copy within one device: {ceilings['device_copy_gb_per_s']:.0f} GB/s (each byte read and written)."
