"""The command line of the serving program."""

from pathlib import Path

import pytest
from chats import write_chat_model

from rollcast.launch.serve.__main__ import parse, rollout_config
from rollcast.rollout import PreflightError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("serve") / "model"
    write_chat_model(folder)
    return str(folder)


def test_help_mentions_flags_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--model FOLDER", "--openai-flags FLAGS", "--read-timeout S", "(8000)", "(3600)", "torchrun"):
        assert text in shown


def test_every_engine_has_a_server(model: str) -> None:
    config = rollout_config(parse(["--model", model]))
    assert (config.openai_port, list(config.openai_flags), config.trainer_gpus) == (0, [], False)


def test_flags_reach_the_engines_servers(model: str) -> None:
    flags = ["--openai-flags=--enable-auto-tool-choice --tool-call-parser hermes", "--served-model-name", "it"]
    config = rollout_config(parse(["--model", model, "--openai-port", "9000", *flags]))
    assert config.openai_port == 9000
    tool_flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    assert list(config.openai_flags) == [*tool_flags, "--served-model-name", "it"]


def test_encrypted_engines_are_refused(model: str) -> None:
    with pytest.raises(PreflightError, match="leave --ssl"):
        rollout_config(parse(["--model", model, "--openai-flags=--ssl-keyfile key.pem"]))


def test_a_timeout_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--read-timeout", "0"])
    assert "must be positive" in capsys.readouterr().err
