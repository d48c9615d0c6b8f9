"""One model of the latency benchmark (both ranks of a torchrun job that `sync_latency.py` starts).

torchrun --standalone --nproc-per-node 2 -m latency.job SPEC.json
"""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console

from latency.bench import Bench, Run, Sample
from latency.ceilings import ceilings
from latency.decode import updates_while_decoding
from latency.methods import METHODS
from latency.models import manifest_of, random_weights
from latency.spec import JobSpec, Line, append
from latency.stats import Row, decode_summary, summary
from rollcast.rollout import Job, join

CONSOLE = Console(stderr=True, highlight=False)
MAX_ERROR_CHARS = 500


def main() -> int:
    """Take this rank's place; the trainer measures. Return the exit code."""
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=JobSpec)
    trainer = os.environ["RANK"] == "0"
    try:
        # While the engine starts, not after it.
        weights = make_weights(spec) if trainer else {}
        with join(spec.rollout_config()) as job:
            if trainer:
                measure_all(job, spec, weights)
    except Exception as error:
        traceback.print_exc()
        if trainer:
            append(spec.results, Line("error", error_text(error)))
        return 1
    return 0


def make_weights(spec: JobSpec) -> dict[str, torch.Tensor]:
    """Return the trainer's weights, on its device."""
    device = torch.device("cuda", torch.cuda.current_device()) if spec.device == "cuda" else torch.device("cpu")
    return random_weights(manifest_of(spec.folder), device=device)


def measure_all(job: Job, spec: JobSpec, weights: dict[str, torch.Tensor]) -> None:
    """Measure every method of the spec in turn; each row is written as soon as it is known."""
    bench = Bench(job, spec, weights)
    facts = bench.call("bench_facts")
    bench.reset_peak()
    before = bench.peak()
    start = time.perf_counter()
    bench.record_fingerprints()
    facts |= {"model": spec.model, "checked_first_syncs_s": time.perf_counter() - start}
    append(spec.results, Line("engine", facts))
    if spec.ceilings:
        append(spec.results, measure_ceilings(bench))
    for name in spec.methods:
        for row in measure(bench, name, before=before, kv_cache_tokens=facts["kv_cache_tokens"]):
            append(spec.results, Line("row", row))
            CONSOLE.print(progress(row), soft_wrap=True)


def measure_ceilings(bench: Bench) -> Line:
    """Measure the machine's ceilings; a failure is a line, too."""
    try:
        return Line("ceilings", ceilings(bench))
    except Exception as error:
        return Line("error", f"ceilings: {error_text(error)}")


def measure(bench: Bench, name: str, *, before: dict[str, int], kv_cache_tokens: int) -> list[Row]:
    """Return the method's rows: with an idle engine and, for rollcast's own, with one that decodes.

    `before` is the memory in use, by side, before the first sync of the job.
    """
    method = METHODS[name]
    head: Row = {"model": bench.spec.model, "method": name, "bytes": bench.nbytes, "tensors": len(bench.weights)}
    rows: list[Row] = []
    try:
        bench.release()
        bench.reset_peak()
        before = before if method.is_rollcast else bench.peak()
        with method.open(bench) as run:
            rows.append(head | idle(bench, run, before=before, check=method.sends_weights))
            if bench.spec.decode and method.is_rollcast:
                head["decoding"] = bench.spec.decode
                rows.append(head | decoding(bench, run, kv_cache_tokens, before=before))
    except Exception as error:
        rows.append(head | {"error": error_text(error)})
    return rows


def idle(bench: Bench, run: Run, *, before: dict[str, int], check: bool) -> Row:
    """Check what the first update leads to, then time others."""
    first = bench.timed(run)
    checked = {"correct": bench.correct()} if check else {}
    return checked | summary(repeated(bench, run, first), bench.nbytes) | memory(bench, before)


def decoding(bench: Bench, run: Run, kv_cache_tokens: int, *, before: dict[str, int]) -> Row:
    """Time updates while the engine decodes."""
    samples, stops = updates_while_decoding(bench, run, kv_cache_tokens=kv_cache_tokens)
    times = summary(samples, bench.nbytes) | decode_summary(stops) | memory(bench, before)
    return {"correct": bench.correct()} | times


def repeated(bench: Bench, run: Run, first: Sample) -> list[Sample]:
    """Time as many updates as the budget allows; return the first one if it alone takes all of it."""
    budget_s = bench.spec.max_seconds
    if first.seconds >= budget_s:
        return [first]
    # The check took memory of its own. An update that is not timed allocates again what the method needs.
    bench.reset_peak()
    bench.timed(run)
    samples: list[Sample] = []
    end = time.perf_counter() + budget_s
    while len(samples) < bench.spec.repeats and (not samples or time.perf_counter() < end):
        samples.append(bench.timed(run))
    return samples


def memory(bench: Bench, before: dict[str, int]) -> Row:
    """Return the most bytes that the method needs beside the weights, by side; unknown on CPU."""
    if bench.device.type == "cpu":
        return {"peak_extra_bytes": None}
    return {"peak_extra_bytes": {side: used - before[side] for side, used in bench.peak().items()}}


def progress(row: Row) -> str:
    """Return one line about the row."""
    where = f"{row['model']}, {row['method']}" + (f", {row['decoding']} decoding" if "decoding" in row else "")
    if "error" in row:
        return f"{where}: [red]{row['error'].splitlines()[0]}[/]"
    stop = f", decoding stops for {row['decode_stop_s'] * 1e3:.1f} ms" if "decode_stop_s" in row else ""
    wrong = "" if row.get("correct", True) else " [red](weights are wrong)[/]"
    return f"{where}: {row['p50_s'] * 1e3:.2f} ms, {row['gb_per_s']:.1f} GB/s, {row['repeats']} times{stop}{wrong}"


def error_text(error: Exception) -> str:
    """Return the text of a failure for its row."""
    text: Any = str(error)
    return (text or type(error).__name__)[:MAX_ERROR_CHARS]


if __name__ == "__main__":
    sys.exit(main())
