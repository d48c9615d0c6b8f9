"""Nothing hangs, nor serves partially updated weights: failing and killed workers, no start, Ctrl-C."""

import re
import time
from pathlib import Path

import pytest
from faults import LOST, meet_a_hang, meet_a_kill, survive_a_raise
from jobs import SharedJob
from models import build
from torchrun import TorchrunJob, job_script, run_job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

GRPO = ("-m", "rollcast.launch.grpo", "--steps", "10000")


def test_a_raising_worker_is_survived(two_trainers: SharedJob) -> None:
    old = two_trainers.trainer.version
    for survived in two_trainers.on_trainers(survive_a_raise):
        assert survived.failure.after_s < 20
        assert f"the worker dropped version {old + 2} on the floor" in survived.failure.problem
        assert survived.refusal.startswith("engine 0 has partially updated weights")
        assert survived.version == old + 2 and survived.served == (old + 2,)


@pytest.mark.ends_job
def test_a_killed_worker_fails_the_sync_and_ends_the_job(two_trainers: SharedJob) -> None:
    """On every rank; no process is left when the trainers leave."""
    for killed in two_trainers.on_trainers(meet_a_kill):
        assert "engine 0" in killed.failure.problem and killed.failure.after_s < 20
        assert LOST.search(killed.refusal), killed


@pytest.mark.ends_job
def test_a_hanging_worker_fails_the_sync_within_the_deadline(two_trainers: SharedJob) -> None:
    """On every rank; no process is left when the trainers leave, the hanging one included."""
    version = two_trainers.trainer.version
    first, *others = two_trainers.on_trainers(meet_a_hang, 8.0)
    text = rf"sync of version {version + 2} failed: engine 0: no reply to 'receive' by its deadline of [\d.]+ s"
    assert re.search(text, first.problem)
    for failure in (first, *others):
        assert failure.problem and 5 < failure.after_s < 9


def test_an_engine_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("tied").save_pretrained(folder)
    job = run_job(job_script("no_start.py"), folder, ranks=2, cwd=tmp_path, timeout_s=120)
    assert job.code != 0
    assert "engine 0 did not start" in job.output
    assert "no-such-quantization" in job.output


@pytest.mark.parametrize(
    ("step", "mode"), [(0, "on_policy"), pytest.param(1, "async", marks=pytest.mark.slow)], ids=["start", "async"]
)
def test_ctrl_c_ends_every_process_within_ten_seconds(tmp_path: Path, step: int, mode: str) -> None:
    """To torchrun alone while the engine starts, and as a terminal does while generation and training go on.

    Between steps: see the tests of the main job.
    """
    job = TorchrunJob(*GRPO, "--mode", mode, ranks=2, cwd=tmp_path)
    if step:
        job.wait_for(f"step {step:3d}", timeout_s=200)
    else:
        log = next_engine_log(job, tmp_path, timeout_s=200)
        assert log.exists() and "step" not in job.output
    job.interrupt(whole_group=bool(step))
    done = job.finish(timeout_s=10)
    assert done.code != 0


def next_engine_log(job: TorchrunJob, folder: Path, *, timeout_s: float) -> Path:
    """The engine's log, once it says that the engine starts."""
    end = time.monotonic() + timeout_s
    while not (logs := list(folder.glob("runs/*/engine-0.log"))) or "Initializing" not in logs[0].read_text():
        job.check(time.monotonic() < end, f"the engine does not start within {timeout_s} s")
        time.sleep(0.05)
    return logs[0]
