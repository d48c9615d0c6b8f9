"""The command line of the GRPO job, and the import of a user's own task."""

import os
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rollcast.launch.grpo import __main__ as grpo
from rollcast.launch.grpo.options import HELP, GrpoConfig, parse
from rollcast.launch.grpo.task import Task, import_reward, load_task, read_prompts
from rollcast.rollout.job.world import without_torchrun

FLAGS = ["--" + field.name.replace("_", "-") for field in fields(GrpoConfig)]


def test_every_setting_has_help_and_every_help_a_setting() -> None:
    assert set(HELP) == {field.name for field in fields(GrpoConfig)}
    assert all(text.strip() for text in HELP.values())


def test_help_mentions_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    mentioned = set(shown.replace(",", " ").split())
    assert [flag for flag in FLAGS if flag not in mentioned] == []
    assert "torchrun" in shown
    assert f"(default: {GrpoConfig().learning_rate})" in " ".join(shown.split())


def test_no_flags_mean_the_dataclass_defaults() -> None:
    assert parse([]) == GrpoConfig()


def test_flags_reach_their_settings() -> None:
    numbers = ["--trainers", "2", "--steps", "3", "--prompts-per-step", "8", "--learning-rate", "1e-5"]
    texts = ["--model", "m", "--task", "a.b:c", "--parallel", "ddp", "--device", "cpu", "--max-model-len", "99"]
    config = parse([*numbers, *texts, "--logprob-tolerance", "0.5", "--no-enforce-eager"])
    assert (config.trainers, config.steps, config.prompts_per_step, config.learning_rate) == (2, 3, 8, 1e-5)
    assert (config.model, config.task, config.parallel, config.device) == ("m", "a.b:c", "ddp", "cpu")
    assert (config.max_model_len, config.logprob_tolerance, config.enforce_eager) == (99, 0.5, False)
    assert parse(["--enforce-eager"]).enforce_eager is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompts-per-step 9 --trainers 2", "prompts_per_step 9 cannot be split evenly over 2 trainers"),
        (
            "--prompts-per-step 3 --samples-per-prompt 3 --minibatches 2",
            "9 samples of a trainer cannot be split evenly",
        ),
        ("--samples-per-prompt 1 --minibatches 1", "samples_per_prompt must be at least 2"),
        ("--samples-per-prompt 0", "samples_per_prompt must be at least 1, got 0"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--max-tokens -1", "max_tokens must be at least 1, got -1"),
        ("--epochs 0", "epochs must be at least 1"),
        ("--minibatches 0", "minibatches must be at least 1"),
        ("--max-staleness -1", "max_staleness must be at least 0, got -1"),
        ("--mode async --pause-mode abort", "pause_mode abort would cut off what mode async generates"),
        ("--mode sometimes", "argument --mode: invalid choice: 'sometimes'"),
        ("--stale keep", "argument --stale: invalid choice: 'keep'"),
        ("--temperature 0", "temperature must be positive, got 0.0"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--parallel tp", "argument --parallel: invalid choice: 'tp'"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--unheard-of 1", "unrecognized arguments: --unheard-of 1"),
    ],
)
def test_bad_values_end_with_a_message(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(flags.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_no_trainers_end_with_a_message() -> None:
    with pytest.raises(SystemExit):
        parse(["--trainers", "0"])


@pytest.mark.parametrize("flags", ["--trainers -1", "--tensor-parallel-size 0", "--clip -0.2", "--learning-rate -1"])
def test_values_that_fail_later_end_with_a_message(flags: str) -> None:
    with pytest.raises(SystemExit):
        parse(flags.split())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a package in the current folder, with rewards in its module `rewards`."""
    name = f"package_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    code = "LIMIT = 3\n\ndef length(prompt, completion):\n    return len(prompt) + len(completion) / 10\n"
    (tmp_path / name / "rewards.py").write_text(code)
    (tmp_path / name / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_reward_is_found_in_the_current_folder(package: str) -> None:
    assert import_reward(f"{package}.rewards:length")("abc", "de") == pytest.approx(3.2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}.rewards", "is not of the form package.module:function"),
        ("{}.rewards:", "is not of the form package.module:function"),
        (":length", "is not of the form package.module:function"),
        ("{}.absent:length", "No module named"),
        ("{}.broken:length", "No module named 'a_module_that_is_not_there'"),
        ("{}.rewards:width", "has no attribute 'width'"),
        ("{}.rewards:LIMIT", "is not a function but int"),
    ],
)
def test_reward_that_cannot_be_used_is_named(path: str, message: str, package: str) -> None:
    path = path.format(package)
    with pytest.raises(ValueError, match=message) as refusal:
        import_reward(path)
    assert repr(path) in str(refusal.value)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \nthrée\n")
    assert read_prompts(str(path)) == ["one", " two ", "thrée"]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "there is no prompts file"), ("", "is empty"), ("\n\n", "is empty")], ids=repr
)
def test_prompts_file_that_cannot_be_used_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_prompts(str(path))
    assert repr(str(path)) in str(refusal.value)


def test_task_of_the_command_line(package: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    task = load_task(parse(["--task", f"{package}.rewards:length", "--prompts", "prompts.txt"]))
    assert task.prompts == ["one", "two"]
    assert task.reward("ab", "") == 2.0


def test_prompts_are_drawn_alike_from_one_seed() -> None:
    task = Task(["a", "b", "c"], lambda prompt, completion: 0.0)
    drawn = task.draw(50, random.Random(3))
    assert drawn == task.draw(50, random.Random(3)) != task.draw(50, random.Random(4))
    assert (len(drawn), set(drawn)) == (50, {"a", "b", "c"})


def test_built_in_task_has_prompts_and_rewards() -> None:
    task = load_task(GrpoConfig())
    assert task.prompts
    assert 0.0 <= task.reward(task.prompts[0], "") < 1.0


def test_help_of_the_program_needs_neither_torchrun_nor_vllm(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "rollcast.launch.grpo", "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=without_torchrun(os.environ))
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(flag in run.stdout for flag in FLAGS)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "rollcast" in imported
    assert not imported & {"vllm", "transformers", "matplotlib"}


def test_starting_without_torchrun_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo", "--runs", str(tmp_path / "runs")])
    for name in set(os.environ) - set(without_torchrun(os.environ)):
        monkeypatch.delenv(name)
    assert grpo.main() == 1
    assert capsys.readouterr().err.strip() == "rollcast: RANK is not set: start the job with torchrun"
    assert list(tmp_path.iterdir()) == []
