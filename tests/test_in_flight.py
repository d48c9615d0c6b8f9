"""Requests that a sync meets half way, and the pool's and broadcaster's refusals."""

import json
from typing import Any

import pytest
from models import build
from torchrun import JOBS, run_job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LENGTH = 900


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("in_flight")
    build("untied").save_pretrained(folder / "model")
    done = run_job(JOBS / "in_flight.py", folder / "model", folder / "facts.json", ranks=2, cwd=folder, timeout_s=200)
    assert done.code == 0, done.output
    return json.loads((folder / "facts.json").read_text())


def test_keep_freezes_requests_and_they_go_on_under_the_new_version(facts: dict[str, Any]) -> None:
    assert facts["in_place keep"] == [[LENGTH, LENGTH, "length", [0, 1]]] * 12


def test_requests_go_on_while_a_shadow_fills_and_then_under_the_new_version(facts: dict[str, Any]) -> None:
    assert facts["shadow keep"] == [[LENGTH, LENGTH, "length", [3, 4]]] * 12


def test_wait_lets_requests_finish_under_the_old_version(facts: dict[str, Any]) -> None:
    assert facts["in_place wait"] == [[LENGTH, LENGTH, "length", [1]]] * 12


def test_abort_ends_requests_with_what_they_have(facts: dict[str, Any]) -> None:
    for tokens, logprobs, reason, versions in facts["in_place abort"]:
        assert 0 <= tokens == logprobs < LENGTH
        assert reason == "abort"
        assert versions[0] == 2


def test_the_old_prefix_cache_serves_nobody(facts: dict[str, Any]) -> None:
    assert max(facts["after"]) < 1e-4


def test_refusals_say_what_to_do(facts: dict[str, Any]) -> None:
    assert facts["replaced"].startswith("RuntimeError: this broadcaster was closed")
    assert facts["not newer"] == "ValueError: version must grow: 4 after 4"
    assert "unknown pause_mode 'never', expected one of keep, wait, abort" in facts["unknown mode"]
    assert facts["newer"] == 5
    assert facts["long prompt"].startswith("ValueError: prompt 1 has 1024 tokens, but max_model_len is 1024")
    assert facts["closed"].startswith("EngineError: the pool is closed")
