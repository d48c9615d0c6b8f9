"""vLLM's own OpenAI-compatible server in every engine: what it answers is as exact as what the pool does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import write_chat_model
from torchrun import run_facts
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollcast.rollout import PreflightError, RolloutConfig
from rollcast.rollout.engine.openai.server import server_args

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SYNCS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openai_servers") / "model"
    write_chat_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture(scope="module")
def facts(model: Path) -> dict[str, Any]:
    return run_facts("openai_servers.py", model.parent, ranks=3, timeout_s=280)


def test_every_engine_answers_as_transformers_would(facts: dict[str, Any], model: Path) -> None:
    assert len(set(facts["addresses"])) == 2
    assert facts["models"] == [["it"], ["it"]]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    prompt = torch.tensor([tokenizer.encode("abc>")])
    wanted = network.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1)[0, 4:].tolist()
    for one in facts["whole"]:
        assert one["tokens"] == wanted
        assert one["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
        assert (one["version"], one["header"], one["spans"]) == (0, "0", [[0, 0]])


def test_a_stream_says_the_same_and_its_version(facts: dict[str, Any]) -> None:
    streamed = facts["streamed"]
    assert "".join(text or "" for text, _ in streamed["pieces"]) == facts["whole"][1]["text"]
    assert streamed["header"] == "0" and {version for _, version in streamed["pieces"]} == {0}


def test_a_stream_of_the_responses_api_tells_its_version(facts: dict[str, Any]) -> None:
    events = facts["responses"]["events"]
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds
    assert facts["responses"]["header"] == "0" and {version for _, version in events} == {0}


def test_several_prompts_and_samples_have_their_places(facts: dict[str, Any]) -> None:
    choices = facts["several"]
    assert [index for index, *_ in choices] == [0, 1, 2, 3]
    first, second, third, fourth = (text for _, text, _ in choices)
    assert first != second and third != fourth
    assert [spans for *_, spans in choices] == [[[0, 0]]] * 4


def test_vllms_own_refusals_stay(facts: dict[str, Any]) -> None:
    assert facts["bad"].startswith("400: ") and "max_tokens" in facts["bad"]


def test_nothing_fails_while_weights_change(facts: dict[str, Any]) -> None:
    answers = facts["talk"]
    assert len(answers) > 20
    assert not [its for its in answers if isinstance(its, str)]
    assert all(versions == sorted(versions) for versions in answers)
    assert {version for versions in answers for version in versions} == set(range(SYNCS + 1))


@pytest.mark.parametrize("place", range(3))
def test_a_request_goes_over_to_the_new_weights_at_the_token_that_it_says(facts: dict[str, Any], place: int) -> None:
    long = facts["long"][place]
    before, after = long["versions"]
    assert long["spans"] == [[before, 0], [after, long["cut"]]] and 10 < long["cut"] < 150
    assert long["version"] == after and long["header"] == str(after)
    assert long["tokens"] == long["wanted"]
    assert long["finish_reason"] == "length"


def test_every_event_of_a_stream_has_the_version_of_its_own_tokens(facts: dict[str, Any]) -> None:
    crossing = facts["crossing"]
    before, after = crossing["versions"]
    made_by = [version for version, tokens in crossing["events"] for _ in tokens]
    cut = made_by.index(after)
    assert made_by == [before] * cut + [after] * (len(made_by) - cut) and 10 < cut < 150
    tokens = [token for _, tokens in crossing["events"] for token in tokens]
    assert tokens[:cut] == crossing["wanted"][:cut]
    assert crossing["header"] == str(before)


def test_guided_text_keeps_its_form_when_a_sync_comes_between(facts: dict[str, Any]) -> None:
    text, spans = facts["guided"]
    assert re.fullmatch("(ab|cd){60}", text)
    assert len(spans) == 2


def test_partially_updated_weights_are_not_served(facts: dict[str, Any]) -> None:
    partial = facts["partial"]
    assert partial["sync"].startswith("SyncError") and "the worker stumbled" in partial["sync"]
    for answer in (partial["whole"], partial["later"], partial["later stream"]):
        assert answer.startswith("503: ") and "partially updated weights" in answer and "the worker stumbled" in answer
    # It had begun: there is no other status any more.
    assert partial["streaming"] == "no 'choices'"
    assert partial["health"] == 503
    assert facts["after"][0] == facts["after"][1] > SYNCS


def test_a_sleeping_engine_says_so(facts: dict[str, Any]) -> None:
    refused, finish_reason, health = facts["asleep"]
    assert refused.startswith("503: ") and "engine 1 sleeps" in refused
    assert (finish_reason, health) == ("length", 200)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--max-model-len", "16"),
            "'--max-model-len 16': max_model_len is not a setting",
        ),
        (("--port", "16"), "'--port 16': port is not a setting"),
        (("--lora-modules", "judge=/path"), "lora_modules is not a setting"),
        (
            ("--reasoning-parser", "qwen3"),
            "reasoning_parser is not a setting of a server inside an engine",
        ),
        (("--enable-auto-tool-choice",), "--enable-auto-tool-choice requires --tool-call-parser"),
        (("--no-such", "16"), "'--no-such 16': not what `vllm serve` takes"),
    ],
)
def test_flags_that_are_not_the_servers_are_refused(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        server_args(model="model", flags=flags)


def test_an_environment_in_which_clients_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with pytest.raises(ValueError, match="unset VLLM_SERVER_DEV_MODE"):
        server_args(model="model", flags=())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"openai_flags": ("--enable-log-requests",)}, "set openai_port"),
        ({"openai_port": -1}, "must be a port or 0, got -1"),
        ({"openai_port": 9000}, "has no tokenizer"),
        ({"openai_port": 9000, "deterministic": True}, "leave openai_port out"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PreflightError, match=words):
        RolloutConfig(model="", dtype="float32", **settings)
