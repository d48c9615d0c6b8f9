"""OpenAI's own client at the front door, while the weights are updated; and the program that serves."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import write_chat_model
from torchrun import TorchrunJob, run_facts
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SYNCS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front_door") / "model"
    write_chat_model(folder)
    return folder


@pytest.fixture(scope="module")
def facts(model: Path) -> dict[str, Any]:
    return run_facts("front_door.py", model.parent, ranks=3, timeout_s=250)


def test_a_chat_is_answered_as_transformers_would(facts: dict[str, Any], model: Path) -> None:
    one = facts["one"]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    prompt = torch.tensor([tokenizer.encode("abc>ABC>de>")])
    wanted = network.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert one["tokens"] == wanted
    assert one["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert one["usage"] == one["logprobs"] == len(wanted)
    assert (one["version"], one["header"], one["spans"]) == (0, "0", [[0, 0]])
    assert "".join(text for text, *_ in facts["streamed"]) == one["text"]
    assert facts["streamed"][-1][1] == one["finish_reason"] and len(facts["streamed"]) > 3
    assert facts["models"] == ["tiny"] and len(set(facts["plain"])) == 1


def test_nothing_fails_while_weights_change(facts: dict[str, Any]) -> None:
    answers = facts["answers"]
    assert len(answers) > 10
    assert not [its for its in answers if isinstance(its, str)]
    assert all(versions == sorted(versions) for versions in answers)
    assert {version for versions in answers for version in versions} == set(range(SYNCS + 1))


def test_what_is_not_understood_is_refused(facts: dict[str, Any]) -> None:
    stop, tokens, length = facts["refused"]
    assert "stop: Extra inputs are not permitted" in stop
    assert "max_tokens: " in tokens
    assert "201 tokens, but the model takes 128" in length


def test_health_and_metrics_tell_the_version(facts: dict[str, Any]) -> None:
    assert [engine["version"] for engine in facts["health"]["engines"]] == [SYNCS] * 2
    assert f"rollcast_policy_version {SYNCS}.0" in facts["metrics"]
    assert f'rollcast_syncs_total{{outcome="ok"}} {SYNCS}.0' in facts["metrics"]


def test_the_program_serves_until_it_is_interrupted(model: Path, tmp_path: Path) -> None:
    flags = ("--model", model, "--port", "0", "--enforce-eager", "--served-model-name", "it", "--openai-port", "0")
    job = TorchrunJob("-m", "rollcast.launch.serve", *flags, ranks=2, cwd=tmp_path)
    job.wait_for("engine 0 alone", timeout_s=120)
    addresses = re.findall(r"at (http://\S+)/v1\b", job.output)
    assert len(addresses) == 2
    for address, name in zip(addresses, ("it", model.name), strict=True):
        body = json.dumps({"model": name, "prompt": "abcd>", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["x-rollcast-version"] == "0"
            assert json.loads(answer.read())["choices"][0]["finish_reason"] in ("stop", "length")
    job.interrupt(whole_group=True)
    assert job.finish(timeout_s=30).seconds < 150
