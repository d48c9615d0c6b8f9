"""Run torchrun jobs for tests, and check that they leave no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).parents[1]
FOLDERS = (TESTS / "support", TESTS / "gpu", *sorted(TESTS.glob("vllm/*/")))
MARKER = "ROLLCAST_TEST_JOB"
# Where jobs find the tests' own modules; the user's places stay.
SEARCH_PATH = os.pathsep.join(filter(None, (*map(str, FOLDERS), os.environ.get("PYTHONPATH"))))


@dataclass
class Finished:
    """A job that has ended."""

    code: int
    output: str
    seconds: float


class TorchrunJob:
    """A running job. `arguments` is what torchrun starts: a script, or "-m" and a module."""

    def __init__(self, *arguments: str | Path, ranks: int, cwd: Path, env: dict[str, str] | None = None) -> None:
        self.marker = uuid.uuid4().hex
        self.output_path = cwd / f"output-{self.marker}.txt"
        environ = os.environ | {MARKER: self.marker, "OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCH_PATH} | (env or {})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        self.started = time.monotonic()
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env=environ,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What the job has printed so far."""
        return self.output_path.read_text(errors="replace")

    def wait_for(self, text: str, *, timeout_s: float) -> None:
        """Wait until the job has printed `text`."""
        end = time.monotonic() + timeout_s
        while text not in self.output:
            self.check(time.monotonic() < end, f"no {text!r} within {timeout_s} s")
            time.sleep(0.05)

    def check(self, as_expected: bool, problem: str) -> None:
        """Fail, and leave no process behind, unless all is as expected and the job is running."""
        if as_expected and self.process.poll() is None:
            return
        if as_expected:
            problem = f"the job ended with {self.process.returncode}"
        for process in self.processes():
            process.kill()
        raise AssertionError(f"{problem}:\n{self.output}")

    def interrupt(self, *, whole_group: bool) -> None:
        """Ctrl-C: to torchrun alone, or, as a terminal does, to every process in its group."""
        (os.killpg if whole_group else os.kill)(self.process.pid, signal.SIGINT)

    def finish(self, *, timeout_s: float) -> Finished:
        """Wait for the end; kill everything and fail if it does not come, or if a process is left."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end within {timeout_s} s:\n{self.output}") from None
        finally:
            seconds = time.monotonic() - self.started
            left = self.processes()
            for process in left:
                process.kill()
        assert not left, f"left behind: {[process.info['cmdline'] for process in left]}\n{self.output}"
        return Finished(code, self.output, seconds)

    def processes(self) -> list[psutil.Process]:
        """Every live process of the job, whoever its parent is by now."""
        return processes_of(self.marker)


def processes_of(marker: str) -> list[psutil.Process]:
    """Every live process whose environment has this marker."""
    variable = f"{MARKER}={marker}"
    alive: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if variable in environ and process.info["status"] != psutil.STATUS_ZOMBIE:
            alive.append(process)
    return alive


def job_script(name: str) -> Path:
    """Path of a job script of the tests, which stands beside the test that runs it."""
    (path,) = (folder / name for folder in FOLDERS if (folder / name).is_file())
    return path


def run_job(
    *arguments: str | Path, ranks: int, cwd: Path, timeout_s: float, env: dict[str, str] | None = None
) -> Finished:
    """Run a job to its end."""
    return TorchrunJob(*arguments, ranks=ranks, cwd=cwd, env=env).finish(timeout_s=timeout_s)


def run_facts(
    job: str, folder: Path, *arguments: str, ranks: int, timeout_s: float, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a job script with the model in `folder`; return its report."""
    report = folder / "facts.json"
    paths = job_script(job), folder / "model", report
    done = run_job(*paths, *arguments, ranks=ranks, cwd=folder, timeout_s=timeout_s, env=env)
    assert done.code == 0, done.output
    return json.loads(report.read_text())


def run_facts_of_trainers(
    job: str, folder: Path, *arguments: str, trainers: int, **options: Any
) -> list[dict[str, Any]]:
    """Return the reports of every trainer rank, each of which writes one. `options` are for `run_job`."""
    report = folder / "facts"
    done = run_job(job_script(job), folder / "model", report, *arguments, cwd=folder, **options)
    assert done.code == 0, done.output
    return [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(trainers)]
