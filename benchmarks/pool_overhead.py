"""What the pool costs: tokens a second of one engine through it, against vLLM's own `LLM.generate` in the same run.

    python benchmarks/pool_overhead.py [--requests 64] [--max-tokens 128] [--shape qwen3-0.6b] [--json FILE]

Both have an engine of their own with the same settings (the benchmark refuses others) and random weights, and the same
requests, in turn. Two engines of the same side differ by 10 % on some machines, by where their memory and threads have
come to lie: so there are several pairs. Without `--shape`, a tiny model: the worst case, for its steps are short. The
last line is one JSON document.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latency_models import SHAPES, write_config
from machine_card import commit, cpu_card, gpu_card

TIMEOUT_S = 1800.0
# vLLM's processes keep their cores busy for a second after a step: the other side must not have to share them.
REST_S = 1.5
Times = dict[str, list[float]]
"""Seconds of each round, by side."""


def main(argv: list[str] | None = None) -> int:
    """The command; inside torchrun, the job's ranks; with `--llm`, vLLM's own side."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.llm:
        serve_llm(options)
    elif "RANK" in os.environ:
        run_rank(options)
    else:
        print(json.dumps(measure(options)), flush=True)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs; what they have found."""
    with tempfile.TemporaryDirectory() as name:
        write_config(options.shape, Path(name, "model"))
        times = [measure_pair(options, Path(name)) for _ in range(options.pairs)]
    command = f"python benchmarks/pool_overhead.py {' '.join(sys.argv[1:])}".strip()
    document = {"machine": card(), "commit": commit(), "command": command, "date": time.strftime("%Y-%m-%d")}
    document |= summary(times, options)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return document


def measure_pair(options: argparse.Namespace, folder: Path) -> Times:
    """Start an engine of each side; seconds of the timed rounds."""
    counts = {name: str(getattr(options, name)) for name in ("requests", "max_tokens", "rounds")}
    flags = [part for name, count in counts.items() for part in (f"--{name.replace('_', '-')}", count)]
    flags += ["--dtype", str(SHAPES[options.shape].dtype).removeprefix("torch.")]
    flags += ["--model", f"{folder}/model", "--out", f"{folder}/found.json", *["--eager"] * options.eager]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": worker_cores()} | os.environ
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    subprocess.run([*torchrun, __file__, *flags], check=True, timeout=TIMEOUT_S, stdout=sys.stderr, env=environ)
    return {side: seconds[1:] for side, seconds in json.loads(Path(folder, "found.json").read_text()).items()}


def worker_cores() -> str:
    """Cores of both engines' workers: the same, for some are faster; the first is left to vLLM's scheduler."""
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores[1:] or cores))


def card() -> dict[str, Any]:
    import torch

    from rollcast.rollout.preflight import usable_gpus

    return cpu_card() | (gpu_card(usable_gpus()[:2]) if torch.cuda.device_count() else {})


def prompts_of(options: argparse.Namespace) -> list[list[int]]:
    return [[3 + (index + place) % 20 for place in range(8)] for index in range(options.requests)]


def run_rank(options: argparse.Namespace) -> None:
    """Rank 0 times both sides in turn; rank 1 is the pool's engine."""
    import torch

    import rollcast.rollout as rollcast

    shared = torch.cuda.device_count() == 1
    config = rollcast.RolloutConfig(
        model=options.model,
        load_format="dummy",
        enforce_eager=options.eager,
        gpu_memory_utilization=0.4,
        worker_extension_cls="latency_worker.BenchWorker",
        # The trainer needs no GPU here.
        colocate=shared,
    )
    with contextlib.ExitStack() as stack:
        # Beside the pool's engine, unless both would count what is free on one GPU.
        early = stack.enter_context(other_side()) if os.environ["RANK"] == "0" and not shared else None
        job = stack.enter_context(rollcast.join(config))
        if job.is_trainer:
            times = time_both(job, early or stack.enter_context(other_side()), options)
            Path(options.out).write_text(json.dumps(times))


def time_both(job: Any, llm: "subprocess.Popen[str]", options: argparse.Namespace) -> Times:
    """Rounds of both sides, in turn."""
    from rollcast.rollout import Sampling

    check_settings(job.pool.call_workers("bench_facts")[0][0], json.loads(heard(llm, "settings")))
    sampling = Sampling(max_tokens=options.max_tokens, ignore_eos=True)
    prompts = prompts_of(options)
    times: Times = {"pool": [], "llm": []}
    for _ in range(1 + options.rounds):
        time.sleep(REST_S)
        start = time.perf_counter()
        groups = job.pool.generate(prompts, sampling)
        times["pool"].append(time.perf_counter() - start)
        assert all(len(its.token_ids) == options.max_tokens for group in groups for its in group)
        times["llm"].append(ask(llm))
    return times


@contextlib.contextmanager
def other_side() -> "Iterator[subprocess.Popen[str]]":
    """vLLM's own `LLM`, in processes of its own, as many keys and values in memory as the pool's engine has."""
    from rollcast.rollout.world import without_torchrun

    environ = {"VLLM_CPU_KVCACHE_SPACE": "1"} | without_torchrun(os.environ)
    with subprocess.Popen(
        [sys.executable, __file__, "--llm", *sys.argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ,
        text=True,
        start_new_session=True,
    ) as llm:
        try:
            yield llm
        finally:
            os.killpg(llm.pid, signal.SIGKILL)


def check_settings(pool: dict[str, Any], llm: dict[str, Any]) -> None:
    """Raise `ValueError` unless both engines are alike: else the times would say nothing of the pool."""
    if other := [f"{name} is {pool[name]} and {its}" for name, its in llm.items() if pool[name] != its]:
        raise ValueError(f"the pool's engine and vLLM's own side differ: {'; '.join(other)}")


def ask(llm: "subprocess.Popen[str]") -> float:
    """Let the other side generate once: its seconds."""
    time.sleep(REST_S)
    assert llm.stdin is not None
    print("go", file=llm.stdin, flush=True)
    return float(heard(llm, "took"))


def heard(llm: "subprocess.Popen[str]", word: str) -> str:
    """The rest of the next line of the other side's that begins so."""
    assert llm.stdout is not None
    for line in llm.stdout:
        if line.startswith(f"{word} "):
            return line.removeprefix(word)
    raise RuntimeError("vLLM's own side has ended")


def summary(pairs: list[Times], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second, and the median of the ratios: neighbours in time share the weather."""
    from latency_stats import interval_of_median

    tokens = options.requests * options.max_tokens
    rounds = [(ours, theirs) for times in pairs for ours, theirs in zip(times["pool"], times["llm"], strict=True)]
    ratios = [theirs / ours for ours, theirs in rounds]
    return {
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "pairs": options.pairs,
        "pool_tokens_per_s": tokens / statistics.median(ours for ours, _ in rounds),
        "llm_tokens_per_s": tokens / statistics.median(theirs for _, theirs in rounds),
        "ratio": statistics.median(ratios),
        "ratio_interval": interval_of_median(ratios),
        "ratio_by_pair": [
            statistics.median(ratios[at : at + options.rounds]) for at in range(0, len(ratios), options.rounds)
        ],
        "pool_s": [ours for ours, _ in rounds],
        "llm_s": [theirs for _, theirs in rounds],
    }


def serve_llm(options: argparse.Namespace) -> None:
    """vLLM's own `LLM`, which generates each time that it is told to."""
    from latency_worker import settings_of
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        # Of "auto", vLLM makes bfloat16 where the model's own is float32.
        dtype=options.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=options.eager,
        gpu_memory_utilization=0.4,
        logprobs_mode="processed_logprobs",
    )
    how: dict[str, Any] = {"ignore_eos": True, "detokenize": False, "logprobs": 0, "flat_logprobs": True}
    sampling = SamplingParams(max_tokens=options.max_tokens, **how)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(options)]
    print(f"settings {json.dumps(settings_of(llm.llm_engine.vllm_config))}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)  # pyright: ignore[reportArgumentType]
        print(f"took {time.perf_counter() - start}", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens a second through the pool, and of vLLM's own LLM.generate.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="the model's (tiny)")
    add("--requests", type=int, default=64, metavar="N", help="prompts of a round (64)")
    add("--max-tokens", type=int, default=128, metavar="N", help="of each completion (128)")
    add("--rounds", type=int, default=7, metavar="N", help="timed rounds of each pair, after one that warms up (7)")
    add("--pairs", type=int, default=3, metavar="N", help="engines of both sides, started one pair after the other (3)")
    add("--eager", action="store_true", help="engines without torch.compile and CUDA graphs")
    add("--json", type=Path, metavar="FILE", help="write the document to this file")
    add("--llm", action="store_true", help=argparse.SUPPRESS)
    add("--dtype", help=argparse.SUPPRESS)
    add("--model", help=argparse.SUPPRESS)
    add("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.requests, options.max_tokens, options.rounds, options.pairs) < 1:
        parser.error("--requests, --max-tokens, --rounds and --pairs must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
