"""The program that serves, with OpenAI's own client as its user while the weights are updated."""

import json
import re
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from chats import write_chat_model
from frontend_facts import Conversation, Facts, Health
from torchrun import Finished, TorchrunJob, job_script
from trainer import FAULT_FILE
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollcast.launch.grpo.task import CHARACTERS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SYNCS = 4
# What `{"up":true}` is written with.
JSON_CHARACTERS = 'lprstu{}":'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frontend") / "model"
    write_chat_model(folder, characters=CHARACTERS + JSON_CHARACTERS)
    return folder


@dataclass
class Served:
    """A run of the program."""

    facts: Facts
    address: str
    ended: Finished
    """From Ctrl-C on, as a terminal sends it."""


@pytest.fixture(scope="module")
def served(model: Path) -> Served:
    report, port = model.parent / "facts.json", free_port()
    # The worker looks for its faults there: there are none.
    fault_file = model.parent / "fault"
    fault_file.write_text("")
    environ = {FAULT_FILE: str(fault_file)}
    job = TorchrunJob(job_script("frontend.py"), model, report, port, ranks=3, cwd=model.parent, env=environ)
    try:
        job.wait_for("the facts are written", timeout_s=250)
        interrupted = time.monotonic()
        job.interrupt(whole_group=True)
    finally:
        ended = job.finish(timeout_s=30)
    seconds = time.monotonic() - interrupted
    facts = msgspec.json.decode(report.read_bytes(), type=Facts)
    return Served(facts, f"http://127.0.0.1:{port}", replace(ended, seconds=seconds))


@pytest.fixture(scope="module")
def facts(served: Served) -> Facts:
    return served.facts


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_a_chat_is_answered_as_transformers_would(facts: Facts, model: Path) -> None:
    whole, pieces = facts.whole, facts.streamed
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    prompt = torch.tensor([tokenizer.encode("abc>ABC>de>")])
    wanted = network.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert whole.tokens == wanted
    assert whole.text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert whole.usage == whole.logprobs == len(wanted)
    assert (whole.version, whole.header, whole.spans) == (0, "0", [(0, 0)])
    assert "".join(piece.text or "" for piece in pieces) == whole.text
    assert pieces[-1].finish_reason == whole.finish_reason and len(pieces) > 3
    assert facts.models == ["tiny"] and len(facts.samples) == 2 and len(set(facts.samples)) == 1


def test_a_tool_is_called_as_asked(facts: Facts) -> None:
    assert facts.tool_call.name == "add"
    assert json.loads(facts.tool_call.arguments)["up"] in (True, False)


def test_a_tools_result_is_part_of_the_prompt(facts: Facts) -> None:
    assert facts.tool_history == len("abc>>ABC>")


def test_a_stop_string_ends_the_text(facts: Facts) -> None:
    stopped = facts.stop
    assert stopped.text == stopped.without_stop.partition(stopped.stop)[0]
    assert stopped.finish_reason == "stop"


def test_arguments_of_the_chat_template_reach_it(facts: Facts) -> None:
    assert facts.template_argument.with_argument == facts.template_argument.without_argument + 4


def test_alternatives_of_tokens_are_listed(facts: Facts) -> None:
    assert facts.top_logprobs == [3] * 4


def test_structured_output_has_its_form(facts: Facts) -> None:
    assert re.fullmatch("(ab|cd){6}", facts.structured)


def test_the_responses_api_answers(facts: Facts) -> None:
    assert isinstance(facts.response, str)


def test_nothing_fails_while_weights_change(facts: Facts) -> None:
    answers = facts.answers
    assert len(answers) > 10
    assert not [answer.problem for answer in answers if answer.problem]
    assert all(answer.versions == sorted(answer.versions) for answer in answers)
    assert {version for answer in answers for version in answer.versions} == set(range(SYNCS + 1))


def test_what_vllm_refuses_is_refused(facts: Facts) -> None:
    no_tokens, too_long = facts.refusals.no_tokens, facts.refusals.too_long
    assert no_tokens.startswith("400: ") and "max_tokens" in no_tokens
    assert too_long.startswith("400: ") and "128" in too_long


def test_a_conversation_stays_with_its_engine(facts: Facts) -> None:
    assert facts.conversation == Conversation(turns=["1"] * 4, other="0")


def test_another_engine_answers_for_one_that_is_gone(facts: Facts) -> None:
    assert facts.without_first_engine == ["1"] * 3


def test_metrics_have_the_version_and_the_responses(facts: Facts) -> None:
    assert f"rollcast_policy_version {SYNCS}.0" in facts.metrics
    # The self-test is one, too.
    assert f'rollcast_syncs_total{{outcome="ok"}} {SYNCS + 1}.0' in facts.metrics
    answered = re.findall(r'rollcast_frontend_responses_total\{engine="(.)",status="200"\} (\d+)', facts.metrics)
    assert {engine for engine, _ in answered} == {"0", "1"}


def test_engines_that_sleep_do_not_serve(facts: Facts) -> None:
    asleep = facts.asleep
    assert asleep.problem.startswith("503: ")
    assert all(f"engine {engine} sleeps" in asleep.problem for engine in range(2))
    assert asleep.before == asleep.after == Health(status=200, engines=[True, True])
    assert asleep.during == Health(status=503, engines=[False, False])
    assert asleep.engine_after in ("0", "1")


def test_a_client_that_disconnects_aborts_its_request(facts: Facts) -> None:
    assert facts.disconnect.requests == 1
    assert facts.disconnect.after_s < 2.0


def test_the_program_prints_its_addresses_and_ends_when_interrupted(served: Served) -> None:
    addresses = re.findall(r"at (http://\S+)/v1\b", served.ended.output)
    assert addresses[0] == served.address and len(set(addresses)) == 3
    assert served.ended.seconds < 20


def test_engines_can_be_asked_directly(facts: Facts) -> None:
    assert facts.direct == [facts.whole] * 2
