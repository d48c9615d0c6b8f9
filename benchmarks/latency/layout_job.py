"""Layouts of one placement of the latency benchmark (all ranks of a torchrun job that `sync_latency.py` starts).

torchrun --standalone --nproc-per-node N -m latency.layout_job SPEC.json
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from latency.bench import Sample
from latency.gathered import gathering_broadcaster
from latency.job import error_text
from latency.layout_bench import FreshLoad, LayoutBench
from latency.layout_spec import LayoutSpec
from latency.layouts import Layout
from latency.models import manifest_of
from latency.raw_senders import RawSenders
from latency.sharded_weights import rank_weights
from latency.spec import Line, append
from latency.stats import Row, summary
from latency.trainer_ranks import TrainerRanks
from rollcast.comm import Manifest
from rollcast.rollout import Job, join

CONSOLE = Console(stderr=True, highlight=False)


def main() -> int:
    """Take this rank's place; the trainers measure. Return the exit code."""
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=LayoutSpec)
    start = time.perf_counter()
    first = os.environ["RANK"] == "0"
    try:
        with join(spec.rollout_config()) as job:
            if job.is_trainer:
                LayoutJob(job, spec).measure_all(started_s=time.perf_counter() - start)
    except Exception as error:
        traceback.print_exc()
        if first:
            append(spec.results, Line("error", error_text(error)))
        return 1
    return 0


class LayoutJob:
    """Measures the layouts of a job, one after the other. Every trainer rank has one; rank 0 writes the rows."""

    def __init__(self, job: Job, spec: LayoutSpec) -> None:
        self._job = job
        self._spec = spec
        self._device = torch.device("cpu")
        if spec.device == "cuda":
            torch.cuda.set_device(job.world.gpu_index)
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._ranks = TrainerRanks(rank=job.trainer_rank, size=job.config.trainers, device=spec.device)
        self._version = 0
        self._manifest: Manifest
        self._fresh: FreshLoad | None = None

    def measure_all(self, *, started_s: float) -> None:
        """Measure every method in every layout. Collective."""
        self._manifest = manifest_of(self._spec.folder)
        self._ranks.together(self._record_fresh_load)
        self._write(Line("engine", self._facts(started_s)) if self._ranks.rank == 0 else None)
        for layout in self._spec.layouts:
            self._say(f"{self._spec.model}, {layout}: making the weights")
            bench = self._open(layout)
            for method in self._spec.methods:
                self._measure(bench, method)
            bench.weights.local.clear()
            bench.weights.state.clear()
            bench.reset_peak()
        self._ranks.close()

    def _record_fresh_load(self) -> None:
        self._fresh = FreshLoad(self._job) if self._ranks.rank == 0 else None

    def _facts(self, started_s: float) -> Row:
        facts = self._job.pool.call_workers("bench_facts")[0][0]
        return facts | {"model": self._spec.model, "placement": str(self._spec.layouts[0]), "started_s": started_s}

    def _open(self, layout: Layout) -> LayoutBench:
        weights = rank_weights(self._manifest, layout, rank=self._ranks.rank, device=self._device)
        return LayoutBench(self._job, self._ranks, layout, weights, fresh=self._fresh)

    def _measure(self, bench: LayoutBench, method: str) -> None:
        """Measure one method; its row has the numbers, or the reason why there are none."""
        head = head_of(self._spec.model, bench.layout, method) | {"bytes": self._manifest.nbytes}
        bench.reset_peak()
        try:
            measured = METHODS[method](self, bench)
        except Exception as error:
            traceback.print_exc()
            measured = {"error": error_text(error)}
        with suppress(RuntimeError):
            bench.close_broadcaster()
        if measured is not None:
            row = head | measured
            self._write(Line("row", row))
            self._say(progress(row))

    def rollcast(self, bench: LayoutBench) -> Row:
        """Every rank sends what it holds."""
        bench.broadcaster = self._job.broadcaster(bench.weights.state)
        # A broadcaster of the gathering path was not the job's own, and the version grows with it, too.
        bench.broadcaster.version = self._version
        return self._syncs(bench, gathered_bytes=0)

    def gathered(self, bench: LayoutBench) -> Row | None:
        """Rank 0 sends everything, after all ranks have gathered it."""
        if bench.layout.trainers == 1 or bench.layout.holds == "ep":
            # Nothing to gather; experts of other ranks are on no mesh that DTensor could gather over.
            return None
        bench.broadcaster = gathering_broadcaster(self._job, bench.weights, version=self._version)
        return self._syncs(bench, gathered_bytes=bench.weights.sharded_bytes())

    def raw(self, bench: LayoutBench) -> Row:
        """As many bytes from as many senders, without names."""
        senders = RawSenders(bench, self._manifest.nbytes)
        senders.update()
        measured = summary(self._repeated(senders.update), self._manifest.nbytes)
        senders.close()
        return {"method": senders.method, "gathered_bytes": 0} | measured | {"peak_extra_bytes": None}

    def _syncs(self, bench: LayoutBench, *, gathered_bytes: int) -> Row:
        broadcaster = bench.broadcaster
        assert broadcaster is not None
        try:
            problem = bench.first_sync()
            # The first one makes plans and joins groups. This one leads to the weights of the fresh load.
            second = bench.sync()
            problem = problem or bench.mismatch()
            samples = [second] if second.seconds >= self._spec.max_seconds else self._repeated(bench.sync)
            peak = bench.peak_extra_bytes()
            problem = problem or bench.mismatch()
        finally:
            self._version = broadcaster.version
        row = {"correct": problem is None} | ({"problem": problem} if problem else {})
        row |= {"gathered_bytes": gathered_bytes} | summary(samples, self._manifest.nbytes)
        return row | {"peak_extra_bytes": peak}

    def _repeated(self, update: Callable[[], Sample]) -> list[Sample]:
        """Time as many updates as the budget allows. All ranks see the same times, and stop together."""
        samples: list[Sample] = []
        spent_s = 0.0
        while len(samples) < self._spec.repeats and (not samples or spent_s < self._spec.max_seconds):
            samples.append(update())
            spent_s += samples[-1].seconds
        return samples

    def _write(self, line: Line | None) -> None:
        if self._ranks.rank == 0 and line is not None:
            append(self._spec.results, line)

    def _say(self, text: str) -> None:
        if self._ranks.rank == 0:
            CONSOLE.print(text, soft_wrap=True)


METHODS: dict[str, Callable[[LayoutJob, LayoutBench], Row | None]] = {
    "rollcast": LayoutJob.rollcast,
    "raw": LayoutJob.raw,
    "rollcast-gathered": LayoutJob.gathered,
}


def head_of(model: str, layout: Layout, method: str) -> Row:
    """Return what identifies a row."""
    return {
        "model": model,
        "layout": str(layout),
        "method": method,
        "trainers": layout.trainers,
        "holds": layout.holds,
        "engines": layout.engines,
        "tensor_parallel_size": layout.tensor_parallel_size,
        "expert_parallel": layout.expert_parallel,
        "colocated": layout.colocated,
    }


def progress(row: Row) -> str:
    """Return one line about the row."""
    where = f"{row['model']}, {row['layout']}, {row['method']}"
    if "error" in row:
        return f"{where}: [red]{row['error'].splitlines()[0]}[/]"
    wrong = "" if row.get("correct", True) else f" [red]({row['problem']})[/]"
    return f"{where}: {row['p50_s'] * 1e3:.2f} ms, {row['gb_per_s']:.1f} GB/s, {row['repeats']} times{wrong}"


if __name__ == "__main__":
    sys.exit(main())
