"""Shows what the latency benchmark found: table, Markdown, plot (the command's process)."""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
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
    "",
)
OURS, THEIRS, RAW = "#1f6feb", "#8b949e", "#d1242f"


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    method = row["method"] + (f", {row['decoding']} decoding" if "decoding" in row else "")
    if "error" in row:
        return [row["model"], method, *[""] * (len(COLUMNS) - 3), row["error"].splitlines()[0]]
    times = [f"{row[key] * 1e3:.2f}" for key in ("p50_s", "p95_s", "max_s")]
    ratio = "" if row.get("ratio_to_raw") is None else f"{row['ratio_to_raw']:.2f}"
    stop = f"{row['decode_stop_s'] * 1e3:.1f}" if "decode_stop_s" in row else ""
    wrong = "" if row.get("correct", True) else "the engine's weights are wrong"
    measured = [*times, f"{row['gb_per_s']:.1f}", ratio, str(row["repeats"]), stop, extra_gb(row), wrong]
    return [row["model"], method, *measured]


def extra_gb(row: Row) -> str:
    """Extra memory of engine and trainer."""
    extra = row.get("peak_extra_bytes")
    return f"{extra['engine'] / 1e9:.2f} + {extra['trainer'] / 1e9:.2f}" if extra else ""


def show(document: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(*COLUMNS)
    for row in document["results"]:
        table.add_row(*cells(row))
    Console(file=sys.stdout, width=170).print(table)


def markdown(document: dict[str, Any]) -> str:
    """The table in Markdown, with what it was measured on."""
    machine, versions = document["machine"], document["versions"]
    gpus = f"{machine['gpu_count']} x {machine['gpus'][0]}, driver {machine['driver']}, " if "gpus" in machine else ""
    wire = f"NVLink: {'yes' if machine['nvlink'] else 'no'}, " if "gpus" in machine else ""
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"{gpus}{wire}{machine['cpu']}; {software}; commit {document['commit'][:12]}, {document['date']}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join('---' if name in ('model', 'method', 'note') else '--:' for name in COLUMNS)}|",
    ]
    lines += [f"| {' | '.join(cells(row))} |" for row in document["results"]]
    return "\n".join([*lines, "", *ceiling_lines(document["ceilings"])])


def ceiling_lines(ceilings: dict[str, Any]) -> Iterator[str]:
    """What the machine can do at best."""
    if ceilings:
        wire = ", ".join(f"{row['gb_per_s']:.1f} at {row['bytes'] / 2**20:g} MiB" for row in ceilings["raw_broadcast"])
        yield f"Raw broadcast of one buffer, GB/s: {wire}."
        yield f"Copy within one device: {ceilings['device_copy_gb_per_s']:.0f} GB/s (each byte read and written)."


def draw(document: dict[str, Any], path: Path) -> None:
    """One chart for each model: methods by time, the raw broadcast as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in document["results"] if "error" not in row]
    models = [(model, list(rows)) for model, rows in groupby(measured, key=lambda row: row["model"])]
    if not models:
        raise SystemExit("nothing to draw: no method has numbers")
    heights = [len(rows) + 2 for _, rows in models]
    size = (10, 0.34 * sum(heights) + 0.6)
    figure, axes = pyplot.subplots(len(models), 1, figsize=size, height_ratios=heights, squeeze=False)
    for axis, (model, rows) in zip(axes[:, 0], models, strict=True):
        draw_model(axis, model, rows)
    figure.suptitle(f"New weights into a vLLM engine: {hardware(document['machine'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_model(axis: Any, model: str, rows: list[Row]) -> None:
    """Bars of one model; a whisker ends at the slowest repeat."""
    labels = [cells(row)[1] for row in rows]
    times = [row["p50_s"] * 1e3 for row in rows]
    slowest = [(row["max_s"] - row["p50_s"]) * 1e3 for row in rows]
    colors = [OURS if row["method"].startswith("rollcast") else THEIRS for row in rows]
    bars = axis.barh(labels, times, color=colors, xerr=[[0.0] * len(rows), slowest], ecolor="#57606a")
    axis.bar_label(bars, labels=[f" {time:.3g}" for time in times], padding=6, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 2, max(row["max_s"] for row in rows) * 1e3 * 3)
    axis.invert_yaxis()
    axis.set_xlabel("ms, median (log scale); whisker: slowest repeat")
    axis.set_title(
        f"{model}: {rows[0]['bytes'] / 1e9:.3g} GB in {rows[0]['tensors']:,} tensors", loc="left", fontsize=10
    )
    raw = [row["p50_s"] * 1e3 for row in rows if row["method"] == "raw-broadcast"]
    for time in raw:
        axis.axvline(time, color=RAW, linewidth=1, linestyle="--", label="one raw broadcast of as many bytes")
        axis.legend(fontsize=8, loc="lower right")


def hardware(machine: dict[str, Any]) -> str:
    """The machine in a few words."""
    return f"{machine['gpu_count']} x {machine['gpus'][0]}" if "gpus" in machine else f"CPU, {machine['cpu']}"
