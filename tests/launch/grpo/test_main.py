"""Mistakes that rank 0 of the main job finds before any engine starts."""

import os
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore

from rollcast.launch.grpo import __main__ as grpo
from rollcast.rollout.job import World


@pytest.fixture
def rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as rank 0 of two; the folder of its runs."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(World, "store", lambda self, timeout_s: HashStore())
    monkeypatch.setattr(grpo, "end_soon_on_signals", lambda: None)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainers", "2"], "world size 2 does not fit trainers=2"),
        (["--model", "nowhere"], "model 'nowhere' has no config.json"),
        (["--pause-mode", "never"], "unknown pause_mode 'never', expected one of keep, wait, abort"),
        (["--max-model-len", "5"], "has 5 tokens, but max_model_len is 5"),
    ],
)
def test_bad_input_is_refused_before_engines_start(
    rank_0: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("no engine may start")

    monkeypatch.setattr(grpo, "join", never)
    monkeypatch.setattr(sys, "argv", ["grpo", "--runs", os.fspath(rank_0), *flags])
    assert grpo.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("rollcast: ") and message in error, error
