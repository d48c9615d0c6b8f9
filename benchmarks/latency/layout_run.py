"""Start the jobs of the benchmark's layouts and gather their rows (the command's process)."""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from machine_card import machine_card

from latency.layout_spec import LayoutSpec
from latency.layouts import LAYOUTS, Layout, by_placement, fitting
from latency.models import SHAPES, manifest_of, write_config
from latency.run import INTERRUPTED, JobRunner, device_of
from latency.spec import Line, read
from latency.stats import with_ratios
from rollcast.rollout.job.preflight import usable_gpus

# For the start of the engines and trainers, and for each layout: its weights, the checks, what is not timed.
START_S = {"cuda": 150.0, "cpu": 400.0}
LAYOUT_S = 45.0
STOP_S = 30.0
METHODS = ("rollcast", "raw", "rollcast-gathered")
# vLLM's KV cache and activations, beside the weights.
ENGINE_BYTES = 12e9
# A worker's share of the weights, in units of an even one: tensor parallelism replicates some.
WORKER_SHARE = 1.1

Job = tuple[str, list[Layout]]
"""A model, and layouts of one placement."""


class LayoutRunner(JobRunner):
    """Measures layouts, those of one placement in one job."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self._options = options
        self._device = device_of(options.device)
        gpus = len(usable_gpus()) if self._device == "cuda" else None
        self._gpus = gpus
        self.machine: dict[str, Any] = machine_card(gpus=gpus or 0)

    def jobs(self) -> list[Job]:
        """Return the jobs. Raises `ValueError` if a layout cannot be measured."""
        options, found = self._options, list[Job]()
        layouts = fitting(options.layouts, gpus=self._gpus)
        if options.layouts is not LAYOUTS and (large := [each for each in options.layouts if each not in layouts]):
            raise ValueError(f"{', '.join(map(str, large))}: more GPUs than the {self._gpus} of this machine")
        for model in options.models:
            of_model = [layout for layout in layouts if suits(model, layout)]
            found += [(model, group) for group in by_placement(of_model)]
        if not found:
            raise ValueError("no layout to measure: layouts with ep need a mixture-of-experts model, and all need GPUs")
        return found

    def run(self, model: str, layouts: Sequence[Layout], *, add: Callable[[Line], None]) -> None:
        """Run one job; `add` gets its results as soon as they are there. Every layout has a row in the end."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            results = folder / "results.jsonl"
            results.touch()
            write_config(model, folder / "model")
            spec = self._spec(model, layouts, folder, results)
            (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
            lines: list[Line] = []

            def take() -> None:
                new = read(results)[len(lines) :]
                lines.extend(new)
                for line in new:
                    add(line)

            placement = layouts[0].placement
            timeout_s = START_S[self._device] + len(layouts) * (LAYOUT_S + len(METHODS) * spec.max_seconds)
            ranks = placement.trainers + placement.workers
            options: dict[str, Any] = {"ranks": ranks, "timeout_s": timeout_s, "tick": take, "stop_s": STOP_S}
            ended = self.run_job("latency.layout_job", folder, **options)
            take()
            errors = [line.content for line in lines if line.kind == "error"]
            measured = {line.content["layout"] for line in lines if line.kind == "row"}
        for layout in layouts:
            if str(layout) not in measured:
                reason = INTERRUPTED if self.interrupted else "; ".join(errors) or ended
                add(Line("row", {"model": model, "layout": str(layout), "method": "rollcast", "error": reason}))

    def _spec(self, model: str, layouts: Sequence[Layout], folder: Path, results: Path) -> LayoutSpec:
        options = self._options
        return LayoutSpec(
            model=model,
            folder=str(folder / "model"),
            device=self._device,
            layouts=list(layouts),
            methods=list(METHODS),
            repeats=options.repeats,
            max_seconds=options.max_seconds,
            eager=options.eager or self._device == "cpu",
            gpu_memory_utilization=self._utilization(manifest_of(folder / "model").nbytes, layouts[0]),
            results=str(results),
        )

    def _utilization(self, weight_bytes: int, layout: Layout) -> float:
        """Return the share of a GPU that vLLM may fill: trainers need the rest, as do the receivers' buffers."""
        total = self.machine.get("gpu_memory_bytes")
        if total is None:
            return 0.9
        of_worker = weight_bytes / layout.tensor_parallel_size * WORKER_SHARE
        return min((of_worker + ENGINE_BYTES) / total, 0.92)


def suits(model: str, layout: Layout) -> bool:
    """Return whether the layout can hold the model."""
    return not layout.needs_experts or "num_experts" in SHAPES[model].settings


def measure_layouts(
    runner: LayoutRunner, jobs: Sequence[Job], document: dict[str, Any], *, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run every job; the document grows, and is saved, with each row."""
    for model, layouts in jobs:
        start = time.monotonic()

        def add(line: Line) -> None:
            if line.kind in ("row", "engine"):
                document["results" if line.kind == "row" else "engines"].append(line.content)
                document["results"] = with_ratios(document["results"])
                save(document)

        try:
            runner.run(model, layouts, add=add)
        except InterruptedError:
            break
        seconds = round(time.monotonic() - start, 1)
        document["job_seconds"] = [*document.get("job_seconds", []), seconds]
        if runner.interrupted:
            break
    save(document)
    return document
