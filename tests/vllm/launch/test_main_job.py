"""The main job as a user starts it: it learns, engine and trainer have the same weights, and the report has it all."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import build
from torchrun import Finished, TorchrunJob, job_script, run_job

from rollcast.launch.grpo.tiny_model import character_tokenizer

# The fields of a step that depend on tokens and weights alone.
SAME = ("reward", "logprob_mean_diff", "logprob_max_diff", "loss", "tokens")

# Repeatable: a curve that depends on which requests met in a batch ends lower once in some runs.
LEARN = ("--deterministic", "--seed", "7")
SAME_STEPS = 6
# From Ctrl-C until no process is left.
END_S = 10.0

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def run_grpo(tmp_path: Path, *flags: str, ranks: int = 2) -> tuple[Finished, dict[str, Any]]:
    done = run_job("-m", "rollcast.launch.grpo", *flags, ranks=ranks, cwd=tmp_path, timeout_s=360)
    reports = list(tmp_path.glob("runs/*/report.json"))
    return done, json.loads(reports[0].read_text()) if reports else {}


def check_learned(report: dict[str, Any], *, staleness: int = 0) -> None:
    rewards = [step["reward"] for step in report["steps"]]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last >= 0.9 and last - first >= 0.6, rewards
    assert report["final"]["reward"] >= 0.9
    check_agreement(report, staleness=staleness)


def check_agreement(report: dict[str, Any], *, staleness: int = 0) -> None:
    """Check the steps of a run. `staleness` is both the bound and the largest one that must have occurred."""
    steps = report["steps"]
    assert report["status"] == "ok"
    check_steps([*steps, report["final"]])
    assert [step["policy_version"] for step in steps] == list(range(1, len(steps) + 1))
    assert [step["sync"]["version"] for step in steps] == [step["policy_version"] for step in steps]
    assert max(step["staleness_max"] for step in steps) == report["staleness_max"] == staleness
    assert all(step["logprob_max_diff"] is not None for step in steps if step["staleness_max"] == 0)
    for step in steps:
        # In the other modes a batch may have been generated before.
        assert {"generate", "agree", "train", "sync"} - set(step["phase_s"]) <= ({"generate"} if staleness else set())
        assert {"plan", "gather", "pack", "wire", "apply", "control", "total"} <= set(step["sync"]["phases_s"])
        assert step["sync"]["nbytes"] > 100_000 and step["sync"]["gb_per_s"] > 0


def check_steps(steps: list[dict[str, Any]]) -> None:
    """Check that engine and trainer have computed the same log-probabilities wherever they are compared."""
    compared = [step for step in steps if step["logprob_max_diff"] is not None]
    # Two implementations never agree to the last bit.
    assert any(step["logprob_mean_diff"] > 0 for step in compared), "nothing was compared"
    assert all(step["logprob_mean_diff"] <= step["logprob_max_diff"] <= 1e-3 for step in compared)
    assert all(step["logprob_mean_diff"] <= 1e-4 for step in compared)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """A whole run with the default settings, and its folder."""
    folder = tmp_path_factory.mktemp("learned")
    done, _ = run_grpo(folder, *LEARN)
    (run,) = folder.glob("runs/*")
    return done, run


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """The same run, ended by Ctrl-C in a terminal after some steps, and its folder."""
    folder = tmp_path_factory.mktemp("interrupted")
    job = TorchrunJob("-m", "rollcast.launch.grpo", *LEARN, ranks=2, cwd=folder)
    job.wait_for(f"step {SAME_STEPS:3d}", timeout_s=300)
    job.interrupt(whole_group=True)
    done = job.finish(timeout_s=END_S)
    (run,) = folder.glob("runs/*")
    return done, run


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def test_it_learns_from_scratch(learned: tuple[Finished, Path]) -> None:
    done, run = learned
    assert done.code == 0, done.output
    report = report_of(run)
    check_learned(report)
    assert report["config"]["seed"] == 7
    assert report["versions"]["vllm"] and report["versions"]["torch"]
    assert len(report["steps"]) >= 20
    assert (run / "curve.png").stat().st_size > 10_000
    assert "INFO" not in done.output, "vLLM's log belongs in the run folder"


def test_the_same_seed_gives_the_same_curve(learned: tuple[Finished, Path], interrupted: tuple[Finished, Path]) -> None:
    one, other = (
        [{key: step[key] for key in SAME} for step in report_of(run)["steps"][:SAME_STEPS]]
        for _, run in (learned, interrupted)
    )
    assert one == other and len(one) == SAME_STEPS


def test_ctrl_c_ends_every_process_within_ten_seconds(interrupted: tuple[Finished, Path]) -> None:
    done, run = interrupted
    assert done.code != 0
    assert report_of(run)["status"].startswith("KeyboardInterrupt")


@pytest.mark.slow
def test_two_trainers_and_two_engines_learn(tmp_path: Path) -> None:
    done, report = run_grpo(tmp_path, "--trainers", "2", ranks=4)
    assert done.code == 0, done.output
    check_learned(report)
    assert all(len(step["sync"]["workers"]) == 2 for step in report["steps"])


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_same_seed_gives_the_same_curve_on_two_engines(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        done, report = run_grpo(tmp_path / name, "--deterministic", "--seed", "5", "--steps", "12", ranks=3)
        assert done.code == 0, done.output
        check_agreement(report)
        reports.append(report)
    one, other = ([{key: step[key] for key in SAME} for step in report["steps"]] for report in reports)
    assert one == other


@pytest.mark.slow
def test_generation_goes_on_while_training_runs(tmp_path: Path) -> None:
    flags = ["--mode", "async", "--max-staleness", "2", "--steps", "40"]
    done, report = run_grpo(tmp_path, *flags)
    assert done.code == 0, done.output
    check_agreement(report, staleness=2)
    assert (report["mode"], report["samples_dropped"]) == ("async", 0)
    assert "at most 2 versions, 0 dropped" in done.output
    # Most batches were generated before they were needed.
    assert sum("generate" not in step["phase_s"] for step in report["steps"]) >= 5
    rewards = [step["reward"] for step in report["steps"]]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5, rewards


def test_an_engine_that_dies_while_generation_and_training_go_on_ends_the_job(tmp_path: Path) -> None:
    flags = ("--mode", "async", "--max-staleness", "2", "--steps", "10000")
    job = TorchrunJob("-m", "rollcast.launch.grpo", *flags, ranks=2, cwd=tmp_path)
    job.wait_for("step  11", timeout_s=250)
    (worker,) = [process for process in job.processes() if process.name().startswith("VLLM::Worker")]
    worker.kill()
    done = job.finish(timeout_s=20)
    assert done.code != 0
    assert re.search(r"engine 0: lost.*(Worker|died|EngineDead)", done.output, re.DOTALL), done.output
    (run,) = tmp_path.glob("runs/*")
    report = report_of(run)
    assert report["mode"] == "async" and report["status"].startswith(("EngineError", "OrchestratorError", "SyncError"))
    assert 1 <= report["staleness_max"] <= 2
    # Most batches were generated before they were needed.
    assert sum("generate" not in step["phase_s"] for step in report["steps"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["one_step_off"], ["async"], ["async", "--stale", "drop"]], ids=" ".join)
def test_it_learns_as_well_in_every_mode(tmp_path: Path, flags: list[str]) -> None:
    done, report = run_grpo(tmp_path, "--mode", *flags)
    assert done.code == 0, done.output
    check_learned(report, staleness=1 if flags[0] == "one_step_off" else 2)
    assert report["mode"] == flags[0]


@pytest.mark.slow
def test_two_trainers_and_two_engines_in_async_mode(tmp_path: Path) -> None:
    flags = ["--trainers", "2", "--mode", "async", "--stale", "drop", "--max-staleness", "1", "--steps", "8"]
    done, report = run_grpo(tmp_path, *flags, ranks=4)
    assert done.code == 0, done.output
    check_agreement(report, staleness=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_seed_learns(tmp_path: Path, seed: int) -> None:
    done, report = run_grpo(tmp_path, "--seed", str(seed))
    assert done.code == 0, done.output
    check_learned(report)


@pytest.mark.slow
def test_ddp_trainers_share_one_engine(tmp_path: Path) -> None:
    done, report = run_grpo(tmp_path, "--trainers", "2", "--parallel", "ddp", "--steps", "4", ranks=3)
    assert done.code == 0, done.output
    check_agreement(report)


def test_old_weights_in_a_sync_are_detected_with_ones_own_model_and_task_on_two_workers(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("abc>")
    build("untied").save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "prompts.txt").write_text("ab>\n\nccc>\n")
    (tmp_path / "my_task.py").write_text("def reward(prompt, completion):\n    return completion.count('a') / 6\n")
    flags = ["--model", str(tmp_path / "llama"), "--task", "my_task:reward", "--prompts", "prompts.txt"]
    flags += ["--steps", "6", "--max-tokens", "6", "--kl", "0.1", "--tensor-parallel-size", "2"]
    flags += ["--learning-rate", "1e-3", "--temperature", "0.8"]
    done = run_job(job_script("old_weights.py"), *flags, ranks=3, cwd=tmp_path, timeout_s=300)
    assert done.code != 0
    assert "the weights of engine 0 are not the trainer's version 3" in done.output
    (run,) = tmp_path.glob("runs/*")
    report = report_of(run)
    assert report["status"].startswith("LogprobError")
    assert [step["step"] for step in report["steps"]] == [0, 1, 2], "step 2 syncs old weights, step 3 must detect them"
    check_steps(report["steps"])
    assert [len(step["sync"]["workers"]) for step in report["steps"]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "no.such:thing"], "cannot import task 'no.such:thing'"),
        pytest.param(["--device", "cuda"], "not enough GPUs", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_refused_before_engines_start(tmp_path: Path, flags: list[str], message: str) -> None:
    done, _ = run_grpo(tmp_path, *flags)
    assert done.code != 0
    assert message in done.output, done.output
    assert not list(tmp_path.glob("runs/*/engine-0.log")), "no engine may start"
    assert done.seconds < 60
