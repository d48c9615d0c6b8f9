"""Nothing hangs, nor serves partially updated weights: failing and killed workers, no start, Ctrl-C."""

import re
from pathlib import Path

import pytest
from models import build
from torchrun import TorchrunJob, job_script, run_job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

GRPO = ("-m", "rollcast.launch.grpo", "--steps", "10000")


def run_faults(tmp_path: Path, ending: str, *, timeout_s: float) -> str:
    folder = tmp_path / "model"
    build("tied").save_pretrained(folder)
    fault = tmp_path / "fault"
    fault.write_text("")
    job = run_job(
        job_script("faults.py"),
        folder,
        ending,
        str(timeout_s),
        ranks=3,
        cwd=tmp_path,
        timeout_s=240,
        env={"FAULT_FILE": str(fault)},
    )
    assert job.code != 0, job.output
    return job.output


def seconds(output: str, rank: int, what: str) -> float:
    match = re.search(rf"<{rank}> {what} after ([\d.]+) s", output)
    assert match, output
    return float(match[1])


def test_a_raising_worker_is_survived_and_a_killed_one_ends_the_job(tmp_path: Path) -> None:
    output = run_faults(tmp_path, "kill", timeout_s=60.0)
    for rank in (0, 1):
        assert seconds(output, rank, "first failure") < 20
        assert re.search(rf"<{rank}> first failure.*the worker dropped version 2 on the floor", output)
        assert f"<{rank}> refused: engine 0 has partially updated weights" in output
        assert f"<{rank}> mended: version 3, completion of versions (3,)" in output
        assert seconds(output, rank, "raised") < 20
    assert re.search(r"<0> raised.*engine 0: lost.*(Worker|died|EngineDead)", output, re.DOTALL), output


def test_a_hanging_worker_fails_the_sync_within_the_deadline(tmp_path: Path) -> None:
    output = run_faults(tmp_path, "hang", timeout_s=8.0)
    for rank in (0, 1):
        assert 5 < seconds(output, rank, "raised") < 9
    assert re.search(r"sync of version 9 failed: .*deadline.*no answer from engine 0", output)


def test_an_engine_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("tied").save_pretrained(folder)
    job = run_job(job_script("no_start.py"), folder, ranks=2, cwd=tmp_path, timeout_s=120)
    assert job.code != 0
    assert "engine 0 did not start" in job.output
    assert "no-such-quantization" in job.output


def test_an_engine_that_dies_while_training_goes_on_ends_the_job(tmp_path: Path) -> None:
    job = TorchrunJob(*GRPO, "--mode", "async", ranks=2, cwd=tmp_path)
    job.wait_for("step   1", timeout_s=200)
    (worker,) = [process for process in job.processes() if process.name().startswith("VLLM::Worker")]
    worker.kill()
    done = job.finish(timeout_s=20)
    assert done.code != 0
    assert re.search(r"engine 0: lost.*(Worker|died|EngineDead)", done.output, re.DOTALL), done.output


@pytest.mark.parametrize(("whole_group", "mode"), [(False, "on_policy"), (True, "on_policy"), (True, "async")])
def test_ctrl_c_ends_every_process_within_ten_seconds(tmp_path: Path, whole_group: bool, mode: str) -> None:
    job = TorchrunJob(*GRPO, "--mode", mode, ranks=2, cwd=tmp_path)
    if whole_group:
        job.wait_for("step   1", timeout_s=200)
    else:  # while the engine starts
        log = next_engine_log(job, tmp_path)
        assert log.exists() and "step" not in job.output
    job.interrupt(whole_group=whole_group)
    done = job.finish(timeout_s=10)
    assert done.code != 0


def next_engine_log(job: TorchrunJob, folder: Path) -> Path:
    while not (logs := list(folder.glob("runs/*/engine-0.log"))) or "Initializing" not in logs[0].read_text():
        assert job.process.poll() is None, job.output
    return logs[0]
