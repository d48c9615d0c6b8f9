"""Two workers of one engine: the trainer's mistakes, damage on one lane, and weights that vLLM moves meanwhile."""

import re
from typing import Any

import pytest
from models import build
from torchrun import run_facts

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
MISTAKES = {
    "missing": f"would not be written: .*{K_PROJ}",
    "extra": r"does not take parameter model\.odd\.weight \[3\] float32",
    "another shape": rf"does not take parameter {K_PROJ} \[64, 63\]",
    "another kind": rf"the trainer's {K_PROJ} \[64, 64\] int64 does not fit into torch\.float32",
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    build("tied").save_pretrained(folder / "model")
    (folder / "fault").write_text("")
    return run_facts("sharded.py", folder, ranks=3, timeout_s=300, env={"FAULT_FILE": str(folder / "fault")})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_sent(facts: dict[str, Any], mistake: str) -> None:
    assert re.search(MISTAKES[mistake], facts[mistake])
    assert facts["after mistakes"] == [0, False]


@pytest.mark.parametrize("worker", [0, 1])
def test_a_flipped_bit_on_one_lane_names_the_run_and_sets_no_version(facts: dict[str, Any], worker: int) -> None:
    assert re.search(rf"message \d+ of lane {worker} \(\S+\[\d+:\d+\]\): checksum mismatch", facts[f"flipped {worker}"])
    assert facts[f"after flipped {worker}"] == [1, True]


def test_weights_that_moved_are_followed(facts: dict[str, Any]) -> None:
    assert facts["after moving"] == facts["before moving"]


def test_weights_that_move_though_nothing_has_moved_them_fail_the_sync(facts: dict[str, Any]) -> None:
    for way in ("unseen", "unseen aside"):
        assert "was moved while weights were on their way: sync again" in facts[way]
    assert facts["after unseen"] == facts["before moving"]


def test_weights_that_changed_their_layout_are_refused(facts: dict[str, Any]) -> None:
    assert "was replaced and the weights now land elsewhere" in facts["changed"]
    assert "model.layers.0.self_attn.q_norm.weight: vLLM keeps it in another layout" in facts["changed for good"]
    assert facts["after changed"] == [6, True]
