"""Weights that are provably the ones sent: self-test, checksums, comparison, and nothing that grows."""

from typing import Any

import pytest
from models import build
from torchrun import run_facts

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("verify")
    build("tied").save_pretrained(folder / "model")
    (folder / "fault").write_text("")
    return run_facts("verify.py", folder, ranks=2, timeout_s=300, env={"FAULT_FILE": str(folder / "fault")})


def test_a_sync_of_the_same_weights_changes_no_byte(facts: dict[str, Any]) -> None:
    assert facts["after self-test"] == [0, False]


def test_a_self_test_names_what_changed(facts: dict[str, Any]) -> None:
    words = facts["self-test of others"]
    assert "self-test" in words and "tensors changed" in words and "model." in words
    version, refusal = facts["after a failed self-test"]
    assert version == 1 and refusal


def test_a_flipped_bit_names_the_run_and_sets_no_version(facts: dict[str, Any]) -> None:
    assert "run " in facts["flipped"] and "lane 0" in facts["flipped"] and "checksum" in facts["flipped"]
    assert "model." in facts["flipped"] or "lm_head" in facts["flipped"]
    assert facts["after full"] == [2, False]
    assert facts["after flipped"] == [2, True]


def test_full_verification_finds_what_changed_in_memory(facts: dict[str, Any]) -> None:
    assert "model.norm.weight" in facts["flipped late"] and "in memory" in facts["flipped late"]
    assert facts["mended"] == [5, False]


def test_a_flipped_bit_in_a_shadow_leaves_the_old_weights_serving(facts: dict[str, Any]) -> None:
    assert "run " in facts["flipped aside"] and "checksum" in facts["flipped aside"]
    assert facts["after flipped aside"] == [5, False, 1]
    assert facts["switched"] == [6, False]


def test_a_sleeping_engine_says_what_to_do(facts: dict[str, Any]) -> None:
    sync, generate = facts["asleep"]
    assert "engine 0 sleeps: its weights cannot be updated before pool.wake_up" in sync
    assert generate == facts["half awake"] == "engine 0 sleeps: call pool.wake_up() first"
    assert facts["awake"] == [7, False, 1]
    assert "dropped its weights in sleep(level=2): wake it up and sync" in facts["dropped"]
    assert facts["refilled"] == [8, False, 1]


def test_fifty_syncs_leave_nothing_behind(facts: dict[str, Any]) -> None:
    before, after = facts["before"], facts["after"]
    for what in ("python_threads", "threads", "files"):
        # Fewer is no leak: vLLM may end a thread or close a file of its own meanwhile.
        assert all(new <= old for old, new in zip(before[what], after[what], strict=True)), (what, before, after)
    for old, new in zip(before["resident"], after["resident"], strict=True):
        assert new - old < 2 * MEGABYTE
