"""Plot of the latency benchmark's results (the command's process)."""

from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from latency.report import label
from latency.stats import Row

ROLLCAST, OTHERS, RAW, STOP = "#1f6feb", "#8b949e", "#d1242f", "#24292f"
KEY = "dashed: one raw broadcast of as many bytes;  whisker: slowest repeat;  diamond: decoding stops"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw one chart for each model: a bar for each method, and a line for the raw broadcast."""
    measured = [row for row in document["results"] if "error" not in row]
    models = [(model, list(rows)) for model, rows in groupby(measured, key=lambda row: row["model"])]
    if not models:
        raise SystemExit("nothing to draw: no method has numbers")
    heights = [len(rows) + 2.5 for _, rows in models]
    size = (10, 0.32 * sum(heights) + 1.0)
    figure = Figure(figsize=size)
    axes = figure.subplots(len(models), 1, height_ratios=heights, squeeze=False)
    for axis, (model, rows) in zip(axes[:, 0], models, strict=True):
        draw_model(axis, model, rows)
    axes[-1, 0].set_xlabel(f"ms, median, log scale\n{KEY}", fontsize=9)
    figure.suptitle(f"New weights into a vLLM engine: {hardware(document['machine'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_model(axis: Any, model: str, rows: list[Row]) -> None:
    """Draw the bars of one model."""
    times = [row["p50_s"] * 1e3 for row in rows]
    slowest = [(row["max_s"] - row["p50_s"]) * 1e3 for row in rows]
    stops = [(row["decode_stop_s"] * 1e3, place) for place, row in enumerate(rows) if row.get("decode_stop_s")]
    colors = [ROLLCAST if row["method"].startswith("rollcast") else OTHERS for row in rows]
    bars = axis.barh([label(row) for row in rows], times, color=colors, xerr=[[0.0] * len(rows), slowest], ecolor=STOP)
    axis.bar_label(bars, labels=[f"{time:.3g}" for time in times], padding=6, fontsize=8)
    for stop, place in stops:
        axis.plot(stop, place, marker="D", color="white", markeredgecolor=STOP, markersize=6)
    for row in rows:
        if row["method"] == "raw-broadcast":
            axis.axvline(row["p50_s"] * 1e3, color=RAW, linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlim(min(times + [stop for stop, _ in stops]) / 2, max(row["max_s"] for row in rows) * 3e3)
    axis.invert_yaxis()
    axis.set_title(f"{model}: {size_text(rows[0]['bytes'])}, {rows[0]['tensors']:,} tensors", loc="left", fontsize=10)


def size_text(nbytes: int) -> str:
    """Return decimal MB or GB with three digits."""
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def hardware(machine: dict[str, Any]) -> str:
    """Return the machine in a few words."""
    return f"{machine['gpu_count']} x {machine['gpus'][0]}" if "gpus" in machine else f"CPU, {machine['cpu']}"
