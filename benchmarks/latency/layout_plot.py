"""Plot of the benchmark's layouts (the command's process)."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from latency.plot import OTHERS, RAW, ROLLCAST, hardware, size_text
from latency.stats import RAW_METHODS, Row

BARS = {"rollcast": ROLLCAST, "rollcast-gathered": OTHERS}
WIDTH = 0.8 / len(BARS)
KEY = "red line: raw broadcasts of as many bytes from as many senders;  whisker: slowest repeat"


def draw_layouts(document: dict[str, Any], path: Path) -> None:
    """Draw one chart for each model: bars of each layout, and a line for its raw broadcasts."""
    measured = [row for row in document["results"] if "error" not in row]
    models = {
        model: [row for row in measured if row["model"] == model]
        for model in dict.fromkeys(row["model"] for row in measured)
    }
    if not models:
        raise SystemExit("nothing to draw: no layout has numbers")
    counts = [len({row["layout"] for row in rows}) for rows in models.values()]
    figure = Figure(figsize=(10, 0.6 * sum(counts) + 1.6 * len(counts) + 0.8))
    axes = figure.subplots(len(models), 1, height_ratios=[count + 1 for count in counts], squeeze=False)
    for axis, (model, rows) in zip(axes[:, 0], models.items(), strict=True):
        _draw_model(axis, model, rows)
    axes[-1, 0].set_xlabel(f"ms, median, log scale\n{KEY}", fontsize=9)
    figure.suptitle(f"New weights into vLLM engines: {hardware(document['machine'])}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _draw_model(axis: Any, model: str, rows: list[Row]) -> None:
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    for number, (method, color) in enumerate(BARS.items()):
        of_method = [row for row in rows if row["method"] == method]
        if not of_method:
            continue
        places = [layouts.index(row["layout"]) + (number - (len(BARS) - 1) / 2) * WIDTH for row in of_method]
        times = [row["p50_s"] * 1e3 for row in of_method]
        slowest = [(row["max_s"] - row["p50_s"]) * 1e3 for row in of_method]
        errors = [[0.0] * len(times), slowest]
        bars = axis.barh(places, times, height=WIDTH, color=color, label=method, xerr=errors)
        labels = [f"{time:.3g}" if time < 1e3 else f"{time:,.0f}" for time in times]
        axis.bar_label(bars, labels=labels, padding=6, fontsize=8)
    for row in rows:
        if row["method"] in RAW_METHODS:
            place, time_ms = layouts.index(row["layout"]), row["p50_s"] * 1e3
            axis.plot([time_ms, time_ms], [place - 0.45, place + 0.45], color=RAW, linewidth=1.5)
    axis.set_yticks(range(len(layouts)), layouts)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(row["p50_s"] for row in rows) * 5e2, max(row["max_s"] for row in rows) * 3e3)
    axis.legend(fontsize=8)
    axis.set_title(f"{model}: {size_text(rows[0]['bytes'])}", loc="left", fontsize=10)
