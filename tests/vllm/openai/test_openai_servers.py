"""vLLM's own OpenAI-compatible server in every engine: what it answers is as exact as what the pool does."""

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from chat_client import BrokenStream, ChatStream, health, refusal, streamed_chat, whole_chat
from jobs import SharedJob
from oracle import error_text, greedy_tokens
from trainer import Trainer
from transformers import AutoTokenizer

from rollcast.rollout import PreflightError, RolloutConfig, Sampling
from rollcast.rollout.engine.openai.server import server_args

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

STEP_S = 0.01
LONG = 160
PROMPT = "abcd>"
ANSWERS_PER_VERSION = 6
ANSWERS_S = 100.0
TALK_OPTIONS = [{"pause_mode": "keep"}, {"pause_mode": "wait"}, {"pause_mode": "abort"}, {"mode": "shadow"}]


@pytest.fixture
def trainer(two_engines: SharedJob) -> Trainer:
    return two_engines.trainer


@pytest.fixture
def addresses(trainer: Trainer) -> list[str]:
    return [str(engine.openai) for engine in trainer.pool.describe()]


@pytest.fixture
def clients(addresses: list[str]) -> list[openai.OpenAI]:
    return [openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=40) for address in addresses]


@pytest.fixture
def client(clients: list[openai.OpenAI]) -> openai.OpenAI:
    return clients[1]


@pytest.fixture
def tokenizer(trainer: Trainer) -> Any:
    return AutoTokenizer.from_pretrained(trainer.job.config.model)


def half_way(act: Callable[[], Any], request: Callable[[], Any]) -> Any:
    """Act when the request is in flight; its answer."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(request)
        time.sleep(LONG * STEP_S / 2)
        act()
        return answer.result()


def wait_for(answers: list[list[int]], count: int) -> None:
    end = time.monotonic() + ANSWERS_S
    while len(answers) < count and time.monotonic() < end:
        time.sleep(0.01)
    assert len(answers) >= count


def test_every_engine_answers_as_transformers_would(
    trainer: Trainer, addresses: list[str], clients: list[openai.OpenAI], tokenizer: Any
) -> None:
    assert len(set(addresses)) == 2
    expected = greedy_tokens(trainer.model, tokenizer.encode("abc>"), 12)
    for client in clients:
        assert [model.id for model in client.models.list()] == ["it"]
        chat = whole_chat(client, temperature=0.0, max_tokens=12)
        assert chat.tokens == expected
        assert chat.text == tokenizer.decode(expected, skip_special_tokens=True)
        version = trainer.version
        assert (chat.version, chat.header, chat.spans) == (version, str(version), [[version, 0]])


def test_a_stream_has_the_same_text_and_its_version(trainer: Trainer, client: openai.OpenAI) -> None:
    whole = whole_chat(client, temperature=0.0, max_tokens=12)
    stream = streamed_chat(client, temperature=0.0, max_tokens=12)
    assert stream.text == whole.text
    assert stream.header == str(trainer.version)
    assert {event.version for event in stream.events} == {trainer.version}


def test_a_stream_of_the_responses_api_has_its_version(trainer: Trainer, client: openai.OpenAI) -> None:
    options: Any = {"max_output_tokens": 12, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    with client.responses.with_streaming_response.create(model="it", input="abc", stream=True, **options) as raw:
        events = [json.loads(line[6:]) for line in raw.iter_lines() if line.startswith("data: {")]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds
    assert raw.headers.get("x-rollcast-version") == str(trainer.version)
    assert {event.get("policy_version") for event in events} == {trainer.version}


def test_several_prompts_and_samples_have_their_places(trainer: Trainer, client: openai.OpenAI) -> None:
    options: Any = {"max_tokens": 20, "seed": 3, "extra_body": {"ignore_eos": True}}
    answer: Any = client.completions.create(model="it", prompt=[PROMPT, "dcba>"], n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    first, second, third, fourth = (choice.text for choice in answer.choices)
    assert first != second and third != fourth
    assert [choice.policy_spans for choice in answer.choices] == [[[trainer.version, 0]]] * 4


def test_vllms_own_refusals_stay(client: openai.OpenAI) -> None:
    problem = refusal(lambda: whole_chat(client, max_tokens=-1))
    assert problem.startswith("400: ") and "max_tokens" in problem


def test_nothing_fails_while_weights_change(trainer: Trainer, clients: list[openai.OpenAI]) -> None:
    """Chats with both engines, and the pool's own requests beside them, while weights change in every way."""
    start, over, answers = trainer.version, threading.Event(), list[list[int]]()

    def chat_whole(client: openai.OpenAI) -> None:
        while not over.is_set():
            answers.append([version for version, _ in whole_chat(client, max_tokens=100).spans])

    def chat_streamed(client: openai.OpenAI) -> None:
        while not over.is_set():
            answers.append([event.version for event in streamed_chat(client, max_tokens=100).events])

    def generate() -> None:
        while not over.is_set():
            for (sample,) in trainer.pool.generate([[3, 4], [5, 6]], Sampling(max_tokens=100, ignore_eos=True)):
                assert len(sample.token_ids) == 100, sample.finish_reason
                answers.append([*sample.versions])

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(chat, client) for client in clients for chat in (chat_whole, chat_streamed)]
        running.append(threads.submit(generate))
        try:
            for number, options in enumerate(TALK_OPTIONS, start=1):
                wait_for(answers, ANSWERS_PER_VERSION * number)
                trainer.update(**options)
            wait_for(answers, ANSWERS_PER_VERSION * (len(TALK_OPTIONS) + 1))
        finally:
            over.set()
        for each in running:
            each.result()
    assert all(versions == sorted(versions) for versions in answers)
    assert {version for versions in answers for version in versions} == set(range(start, trainer.version + 1))
    assert trainer.version == start + len(TALK_OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"pause_mode": "keep", "kv_cache": "recomputed"},
        {"pause_mode": "abort", "kv_cache": "recomputed"},
        {"mode": "shadow", "kv_cache": "recomputed"},
    ],
    ids=["keep", "abort", "shadow"],
)
def test_a_request_goes_over_to_the_new_weights_at_the_token_that_it_says(
    trainer: Trainer, client: openai.OpenAI, tokenizer: Any, options: dict[str, str]
) -> None:
    trainer.pace(STEP_S)
    prompt, before = tokenizer.encode("abc>"), trainer.version
    expected = greedy_tokens(trainer.model, prompt, LONG)
    chat = half_way(lambda: trainer.update(**options), lambda: whole_chat(client, temperature=0.0, max_tokens=LONG))
    cut = chat.spans[-1][1]
    assert chat.spans == [[before, 0], [before + 1, cut]] and 10 < cut < 150
    assert chat.version == before + 1 and chat.header == str(before + 1)
    after = greedy_tokens(trainer.model, prompt + chat.tokens[:cut], LONG - cut)
    assert chat.tokens == expected[:cut] + after
    assert chat.finish_reason == "length"


def test_every_event_of_a_stream_has_the_version_of_its_own_tokens(
    trainer: Trainer, client: openai.OpenAI, tokenizer: Any
) -> None:
    trainer.pace(STEP_S)
    before = trainer.version
    expected = greedy_tokens(trainer.model, tokenizer.encode("abc>"), LONG)
    stream: ChatStream = half_way(trainer.update, lambda: streamed_chat(client, temperature=0.0, max_tokens=LONG))
    pairs = [(event.version, token) for event in stream.events for token in event.tokens]
    versions, tokens = [version for version, _ in pairs], [token for _, token in pairs]
    cut = versions.index(before + 1)
    assert versions == [before] * cut + [before + 1] * (len(pairs) - cut) and 10 < cut < 150
    assert tokens[:cut] == expected[:cut]
    assert stream.header == str(before)


def test_guided_text_keeps_its_form_when_a_sync_comes_between(trainer: Trainer, client: openai.OpenAI) -> None:
    """The sync takes the pool's requests out of vLLM."""
    trainer.pace(STEP_S)
    options: Any = {"max_tokens": LONG, "extra_body": {"structured_outputs": {"regex": "(ab|cd){60}"}}}
    answer = half_way(
        lambda: trainer.update(pause_mode="abort"),
        lambda: client.completions.create(model="it", prompt=PROMPT, **options),
    )
    (choice,) = answer.choices
    assert re.fullmatch("(ab|cd){60}", choice.text)
    assert len(choice.policy_spans) == 2


def test_partially_updated_weights_are_not_served(trainer: Trainer, client: openai.OpenAI) -> None:
    trainer.pace(STEP_S)
    trainer.set_fault("raise")
    problems: list[str] = []

    def fail() -> None:
        problems.append(error_text(trainer.update))

    with ThreadPoolExecutor(1) as thread:
        streaming = thread.submit(lambda: streamed_chat(client, max_tokens=LONG))
        whole = half_way(fail, lambda: refusal(lambda: whole_chat(client, max_tokens=LONG)))
        # It had begun: there is no other status any more.
        with pytest.raises(BrokenStream):
            streaming.result()
    (problem,) = problems
    failure = f"the worker dropped version {trainer.version + 1} on the floor"
    assert problem.startswith("SyncError") and failure in problem
    later = refusal(lambda: whole_chat(client, max_tokens=3))
    later_stream = refusal(lambda: streamed_chat(client, max_tokens=3))
    for answer in (whole, later, later_stream):
        assert answer.startswith("503: ") and "partially updated weights" in answer and failure in answer
    assert health(client) == 503
    trainer.set_fault("")
    trainer.update()
    assert whole_chat(client, max_tokens=3).version == trainer.version


def test_a_sleeping_engine_says_so(trainer: Trainer, client: openai.OpenAI) -> None:
    trainer.pool.sleep()
    problem = refusal(lambda: whole_chat(client, max_tokens=3))
    assert problem.startswith("503: ") and "engine 1 sleeps" in problem
    trainer.pool.wake_up()
    assert whole_chat(client, max_tokens=3).finish_reason == "length"
    assert health(client) == 200


@pytest.mark.parametrize(
    ("flags", "message"),
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
def test_flags_that_are_not_the_servers_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        server_args(model="model", flags=flags)


def test_an_environment_in_which_clients_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with pytest.raises(ValueError, match="unset VLLM_SERVER_DEV_MODE"):
        server_args(model="model", flags=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"openai_flags": ("--enable-log-requests",)}, "set openai_port"),
        ({"openai_port": -1}, "must be a port or 0, got -1"),
        ({"openai_port": 9000}, "has no tokenizer"),
        ({"openai_port": 9000, "deterministic": True}, "leave openai_port out"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        RolloutConfig(model="", dtype="float32", **settings)
