"""A version is of the same weights wherever it is seen, or it is not seen at all."""

from typing import Any

import pytest
from models import build
from torchrun import run_facts

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("half")
    build("tied").save_pretrained(folder / "model")
    return run_facts("half_committed.py", folder, ranks=3, timeout_s=200)


def check_served(found: list[Any], version: int) -> None:
    assert {engine for engine, *_ in found} == {0, 1}
    assert all(versions == [version] and distance < 1e-4 for _, versions, distance in found), found


def test_what_one_engine_alone_has_committed_is_not_handed_out(facts: dict[str, Any]) -> None:
    check_served(facts["before"], 1)
    assert facts["half committed"].startswith("SyncError: sync of version 2 failed")
    assert "engine 1" in facts["half committed"] and "the worker stumbled" in facts["half committed"]
    assert facts["versions"] == [2, 1], "engine 0 has committed: else this shows nothing"
    refused = [*facts["in flight"], *facts["asked"]]
    assert all("refuses to generate until the next sync" in words for words in refused), refused
    assert any(words.startswith("EngineError: engine 0 has weights of an aborted sync") for words in refused)
    assert any(words.startswith("EngineError: engine 1 has partially updated weights") for words in refused)


def test_the_same_version_may_come_again_with_other_weights(facts: dict[str, Any]) -> None:
    check_served(facts["mended"], 2)


def test_an_interrupted_sync_leaves_nobody_waiting(facts: dict[str, Any]) -> None:
    assert all("refuses to generate until the next sync" in words for words in facts["interrupted"]), facts
    check_served(facts["resumed"], 3)
    version, *served = facts["late"]
    assert version == 4
    check_served(served, 4)
