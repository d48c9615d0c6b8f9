"""Start the latency benchmark's jobs and gather their results (the command's process)."""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from machine_card import job_environ, machine_card, torchrun

from latency.methods import METHODS
from latency.models import manifest_of, write_config
from latency.spec import JobSpec, Line, read
from latency.stats import Row

RANKS = 2
START_S = 240.0
# Time of a method in units of `--max-seconds`: its repeats, and what is not timed.
SHARES = 2
STOP_S = 60.0
TICK_S = 1.0
INTERRUPTED = "the benchmark was interrupted before this was measured"
# vLLM's KV cache and activations beside the weights; what a GPU without shadow buffers must leave free.
ENGINE_BYTES = 40e9
LEAST_ENGINE_BYTES = 8e9
FREE_BYTES = 6e9


@dataclass
class ModelResult:
    """Results of one model's job."""

    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, Any] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, line: Line) -> None:
        """Add one line of the job's file."""
        match line.kind:
            case "row":
                self.rows.append(line.content)
            case "ceilings":
                self.ceilings = line.content
            case "engine":
                self.engines.append(line.content)
            case "error":
                self.errors.append(line.content)


class JobRunner:
    """Runs one torchrun job at a time; SIGTERM ends it, and no further one should be started."""

    def __init__(self) -> None:
        self.interrupted = False
        """Whether SIGTERM ended the benchmark: the rows measured by then are its result."""
        signal.signal(signal.SIGTERM, self._end)

    def run_job(
        self,
        module: str,
        folder: Path,
        *,
        ranks: int,
        timeout_s: float,
        tick: Callable[[], None] = lambda: None,
        stop_s: float = STOP_S,
    ) -> str:
        """Run the module on `spec.json` of the folder to its end, and `tick` meanwhile; return how it ended."""
        # Standard output is for the document alone.
        process = subprocess.Popen(
            torchrun("-m", module, str(folder / "spec.json"), ranks=ranks),
            stdout=sys.stderr,
            env=job_environ(),
            cwd=folder,
        )
        end = time.monotonic() + timeout_s
        try:
            while process.poll() is None and time.monotonic() < end:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(TICK_S, max(end - time.monotonic(), 0)))
                tick()
            if process.returncode is None:
                return f"the job did not end within {timeout_s:.0f} s"
            return f"the job ended with code {process.returncode} before this was measured"
        except InterruptedError:
            return INTERRUPTED
        finally:
            _stop(process, stop_s)

    def _end(self, *_: object) -> None:
        if not self.interrupted:
            self.interrupted = True
            raise InterruptedError


class Runner(JobRunner):
    """Runs one model at a time on this machine's first two GPUs, or on its CPU."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self._options = options
        self._device = device_of(options.device)
        self.machine: dict[str, Any] = machine_card(gpus=RANKS if self._device == "cuda" else 0)

    def run(self, model: str, *, ceilings: bool) -> ModelResult:
        """Measure one model. Every method has a row in the end; one without numbers has the reason."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            results = folder / "results.jsonl"
            results.touch()
            write_config(model, folder / "model")
            spec = self._spec(model, folder, results=results, ceilings=ceilings)
            (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
            timeout_s = START_S + SHARES * spec.max_seconds * len(spec.methods)
            ended = self.run_job("latency.job", folder, ranks=RANKS, timeout_s=timeout_s)
            result = ModelResult()
            for line in read(results):
                result.add(line)
        missing = [method for method in spec.methods if method not in {row["method"] for row in result.rows}]
        reason = "; ".join(result.errors) or ended
        result.rows += [{"model": model, "method": method, "error": reason} for method in missing]
        return result

    def _spec(self, model: str, folder: Path, *, results: Path, ceilings: bool) -> JobSpec:
        options = self._options
        return JobSpec(
            model=model,
            folder=str(folder / "model"),
            device=self._device,
            methods=tuple(options.methods),
            weight_transfer=self._device == "cuda"
            and any(METHODS[name].needs_weight_transfer for name in options.methods),
            repeats=options.repeats,
            decode=options.decode,
            eager=options.eager or self._device == "cpu",
            max_seconds=options.max_seconds,
            gpu_memory_utilization=self._utilization(manifest_of(folder / "model").nbytes),
            ceilings=ceilings,
            results=str(results),
        )

    def _utilization(self, weight_bytes: int) -> float:
        """Return the share of a GPU that vLLM may fill: a copy of the weights must fit beside it."""
        total = self.machine.get("gpu_memory_bytes")
        if total is None:
            return 0.9
        beside = min(ENGINE_BYTES, total - 2 * weight_bytes - FREE_BYTES)
        return min((weight_bytes + max(beside, LEAST_ENGINE_BYTES)) / total, 0.92)


def device_of(choice: str) -> str:
    """Return "cuda" or "cpu" for the command line's choice."""
    on_gpus = torch.cuda.device_count() > 0 if choice == "auto" else choice == "cuda"
    return "cuda" if on_gpus else "cpu"


def _stop(process: "subprocess.Popen[bytes]", stop_s: float) -> None:
    """Terminate torchrun, which stops its ranks."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(stop_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
