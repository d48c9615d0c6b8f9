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
from latency.methods import TABLE
from latency.models import manifest_of, random_weights
from latency.spec import DECODING, JobSpec, Line, append
from latency.stats import Row, decode_summary, summary
from rollcast.rollout import Job, join

CONSOLE = Console(stderr=True, highlight=False)
WORDS = 500


def main() -> int:
    """Take this rank's place; the trainer measures. Returns the exit code."""
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=JobSpec)
    trainer = os.environ["RANK"] == "0"
    try:
        # Beside the engine's start, not after it.
        weights = make_weights(spec) if trainer else {}
        with join(spec.rollout_config()) as job:
            if trainer:
                measure_all(job, spec, weights)
    except Exception as error:
        traceback.print_exc()
        if trainer:
            append(spec.results, Line("error", words(error)))
        return 1
    return 0


def make_weights(spec: JobSpec) -> dict[str, torch.Tensor]:
    """The trainer's weights, on its device."""
    device = torch.device("cuda", torch.cuda.current_device()) if spec.device == "cuda" else torch.device("cpu")
    return random_weights(manifest_of(spec.folder), device=device)


def measure_all(job: Job, spec: JobSpec, weights: dict[str, torch.Tensor]) -> None:
    """Every method of the spec, in turn; each row is written as soon as it is known."""
    bench = Bench(job, spec, weights)
    facts = bench.call("bench_facts")
    bench.settle()
    before = bench.peak()
    start = time.perf_counter()
    bench.learn()
    facts |= {"model": spec.model, "checked_first_syncs_s": time.perf_counter() - start}
    append(spec.results, Line("engine", facts))
    if spec.ceilings:
        append(spec.results, measure_ceilings(bench))
    for name in spec.methods:
        for row in measure(bench, name, before=before, kv_cache_tokens=facts["kv_cache_tokens"]):
            append(spec.results, Line("row", row))
            CONSOLE.print(progress(row), soft_wrap=True)


def measure_ceilings(bench: Bench) -> Line:
    """What the machine can do, or why that is not known."""
    try:
        return Line("ceilings", ceilings(bench))
    except Exception as error:
        return Line("error", f"ceilings: {words(error)}")


def measure(bench: Bench, name: str, *, before: dict[str, int], kv_cache_tokens: int) -> list[Row]:
    """The method's rows: with an idle engine and, where it is measured, with one that decodes.

    `before` is the memory in use before the first sync, from which rollcast's own buffers count.
    """
    head: Row = {"model": bench.spec.model, "method": name, "bytes": bench.nbytes, "tensors": len(bench.weights)}
    rows: list[Row] = []
    try:
        bench.release()
        bench.settle()
        before = before if name in DECODING else bench.peak()
        with TABLE[name](bench) as run:
            rows.append(head | idle(bench, name, run, before=before))
            if bench.spec.decode and name in DECODING:
                head["decoding"] = bench.spec.decode
                rows.append(head | decoding(bench, run, kv_cache_tokens, before=before))
    except Exception as error:
        rows.append(head | {"error": words(error)})
    return rows


def idle(bench: Bench, name: str, run: Run, *, before: dict[str, int]) -> Row:
    """Correctness first, then time."""
    first = bench.timed(run)
    # A raw broadcast carries no weights.
    checked = {} if name.startswith("raw") else {"correct": bench.correct()}
    return checked | summary(repeated(bench, run, first), bench.nbytes) | memory(bench, before)


def decoding(bench: Bench, run: Run, kv_cache_tokens: int, *, before: dict[str, int]) -> Row:
    """The same while the engine decodes."""
    samples, stops = updates_while_decoding(bench, run, kv_cache_tokens=kv_cache_tokens)
    times = summary(samples, bench.nbytes) | decode_summary(stops) | memory(bench, before)
    return {"correct": bench.correct()} | times


def repeated(bench: Bench, run: Run, first: Sample) -> list[Sample]:
    """As many updates as the time allows; the first, if it alone takes all of it."""
    budget_s = bench.spec.max_seconds
    if first.seconds >= budget_s:
        return [first]
    # The check took memory of its own. What the method needs is allocated again by an update that is not timed.
    bench.settle()
    bench.timed(run)
    samples: list[Sample] = []
    end = time.perf_counter() + budget_s
    while len(samples) < bench.spec.repeats and (not samples or time.perf_counter() < end):
        samples.append(bench.timed(run))
    return samples


def memory(bench: Bench, before: dict[str, int]) -> Row:
    """Bytes that the method needs at most beside the weights; on CPU they are not known."""
    if bench.device.type == "cpu":
        return {"peak_extra_bytes": None}
    return {"peak_extra_bytes": {side: used - before[side] for side, used in bench.peak().items()}}


def progress(row: Row) -> str:
    """One line for a person who waits."""
    where = f"{row['model']}, {row['method']}" + (f", {row['decoding']} decoding" if "decoding" in row else "")
    if "error" in row:
        return f"{where}: [red]{row['error'].splitlines()[0]}[/]"
    stop = f", decoding stops for {row['decode_stop_s'] * 1e3:.1f} ms" if "decode_stop_s" in row else ""
    wrong = "" if row.get("correct", True) else " [red](weights are wrong)[/]"
    return f"{where}: {row['p50_s'] * 1e3:.2f} ms, {row['gb_per_s']:.1f} GB/s, {row['repeats']} times{stop}{wrong}"


def words(error: Exception) -> str:
    """What a row says of a failure."""
    text: Any = str(error)
    return (text or type(error).__name__)[:WORDS]


if __name__ == "__main__":
    sys.exit(main())
