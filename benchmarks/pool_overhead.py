"""Overhead of the pool: tokens a second of one engine through it, and of vLLM's own `LLM.generate` in the same run.

    python benchmarks/pool_overhead.py [--requests 64] [--max-tokens 128] [--shape qwen3-0.6b] [--json FILE]

Each has an engine of its own with random weights and the same settings (which is checked), and generates the same
requests, in turn. Two engines with equal settings differ by 10 % on some machines, depending on the placement of memory
and threads: so there are several pairs. Without `--shape`, the model is tiny: the worst case, for its steps are short.
The last line is one JSON document.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from latency.models import SHAPES, write_config
from latency.stats import interval_of_median
from machine_card import commit, job_environ, machine_card, torchrun, versions
from pool_llm import LlmProcess, Workload, llm_process

import rollcast.rollout as rollcast

TIMEOUT_S = 1800.0
# vLLM's processes keep their cores busy for a second after a step: the next side must not share them.
REST_S = 1.5
Times = dict[str, list[float]]
"""Seconds of each round, by side ("pool" or "llm")."""


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    print(json.dumps(measure(parse(sys.argv[1:] if argv is None else argv))), flush=True)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs; return the document."""
    with tempfile.TemporaryDirectory() as name:
        write_config(options.shape, Path(name, "model"))
        times = [measure_pair(options, Path(name)) for _ in range(options.pairs)]
    command = f"python benchmarks/pool_overhead.py {' '.join(sys.argv[1:])}".strip()
    machine = machine_card(gpus=2 if torch.cuda.device_count() else 0)
    document = {"machine": machine, "versions": versions(), "commit": commit(), "command": command}
    document |= {"date": time.strftime("%Y-%m-%d")} | summary(times, options)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return document


def measure_pair(options: argparse.Namespace, folder: Path) -> Times:
    """Start an engine of each side; return the seconds of the timed rounds."""
    load = Workload(
        model=f"{folder}/model",
        dtype=str(SHAPES[options.shape].dtype).removeprefix("torch."),
        eager=options.eager,
        requests=options.requests,
        max_tokens=options.max_tokens,
    )
    out = folder / "times.json"
    command = torchrun(Path(__file__), load.to_json(), str(options.rounds), str(out), ranks=2)
    environ = {"VLLM_CPU_OMP_THREADS_BIND": worker_cores()} | job_environ()
    subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=sys.stderr, env=environ)
    return {side: seconds[1:] for side, seconds in json.loads(out.read_text()).items()}


def worker_cores() -> str:
    """Return the cores of both engines' workers: the same, for some are faster; the first is left to the scheduler."""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores[1:] or cores))


def run_rank(load: Workload, rounds: int, out: Path) -> None:
    """Time both sides in turn on rank 0; rank 1 is the pool's engine."""
    shared = torch.cuda.device_count() == 1
    config = rollcast.RolloutConfig(
        model=load.model,
        load_format="dummy",
        enforce_eager=load.eager,
        gpu_memory_utilization=0.4,
        worker_extension_cls="pool_worker.PoolWorker",
        # The trainer needs no GPU.
        colocate=shared,
    )
    with contextlib.ExitStack() as stack:
        # Start both engines at once, unless they share a GPU, whose free memory each of them measures.
        early = stack.enter_context(llm_process(load)) if os.environ["RANK"] == "0" and not shared else None
        job = stack.enter_context(rollcast.join(config))
        if job.is_trainer:
            times = time_both(job, early or stack.enter_context(llm_process(load)), load, rounds=rounds)
            out.write_text(json.dumps(times))


def time_both(job: Any, llm: LlmProcess, load: Workload, *, rounds: int) -> Times:
    """Time rounds of both sides, in turn."""
    check_settings(job.pool.call_workers("bench_facts")[0][0], llm.facts())
    sampling, prompts = rollcast.Sampling(max_tokens=load.max_tokens, ignore_eos=True), load.prompts()
    times: Times = {"pool": [], "llm": []}
    for _ in range(1 + rounds):
        time.sleep(REST_S)
        start = time.perf_counter()
        groups = job.pool.generate(prompts, sampling)
        times["pool"].append(time.perf_counter() - start)
        assert all(len(sample.token_ids) == load.max_tokens for group in groups for sample in group)
        time.sleep(REST_S)
        times["llm"].append(llm.generate())
    return times


def check_settings(pool: dict[str, Any], llm: dict[str, Any]) -> None:
    """Raise `ValueError` unless both engines have the same settings.

    The sizes of their KV caches may differ, for they depend on the memory that was free.
    """
    names = sorted((pool.keys() | llm.keys()) - {"kv_cache_tokens"})
    if differences := [
        f"{name} is {pool.get(name)} and {llm.get(name)}" for name in names if pool.get(name) != llm.get(name)
    ]:
        raise ValueError(f"the pool's engine and that of vLLM's LLM differ: {'; '.join(differences)}")


def summary(pairs: list[Times], options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second, and the median of the ratios of neighbouring rounds."""
    tokens = options.requests * options.max_tokens
    pool_s, llm_s = ([seconds for times in pairs for seconds in times[side]] for side in ("pool", "llm"))
    ratios = [[b / a for a, b in zip(times["pool"], times["llm"], strict=True)] for times in pairs]
    return {
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "pairs": options.pairs,
        "pool_tokens_per_s": tokens / statistics.median(pool_s),
        "llm_tokens_per_s": tokens / statistics.median(llm_s),
        "ratio": statistics.median(ratio for pair in ratios for ratio in pair),
        "ratio_interval": interval_of_median(ratios),
        "ratio_by_pair": [statistics.median(pair) for pair in ratios],
        "pool_s": pool_s,
        "llm_s": llm_s,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Tokens a second through the pool, and of vLLM's own LLM.generate.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="the model's (tiny)")
    add("--requests", type=int, default=64, metavar="N", help="prompts of a round (64)")
    add("--max-tokens", type=int, default=128, metavar="N", help="of each completion (128)")
    add("--rounds", type=int, default=7, metavar="N", help="timed rounds of each pair, after one that warms up (7)")
    add("--pairs", type=int, default=3, metavar="N", help="engines of both sides, started one pair after the other (3)")
    add("--eager", action="store_true", help="engines without torch.compile and CUDA graphs")
    add("--json", type=Path, metavar="FILE", help="write the document to this file")
    options = parser.parse_args(arguments)
    if min(options.requests, options.max_tokens, options.rounds, options.pairs) < 1:
        parser.error("--requests, --max-tokens, --rounds and --pairs must be at least 1")
    return options


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_rank(Workload.from_json(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
