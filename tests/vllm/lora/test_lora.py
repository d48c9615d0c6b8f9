"""Adapters of a peft model in real engines: log-probabilities are peft's own, and base weights stay as they are."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from models import build
from torchrun import run_facts

from rollcast.rollout.lora import RANKS, accepted_rank, accepted_ranks

ENGINES = [pytest.mark.vllm, pytest.mark.timeout(300)]
TOLERANCE = 1e-4


def run(folder: Path, job: str, *arguments: str, ranks: int) -> dict[str, Any]:
    build("untied").save_pretrained(folder / "model")
    return run_facts(job, folder, *arguments, ranks=ranks, timeout_s=280)


def check_syncs(facts: dict[str, Any]) -> None:
    """Of three versions, each replacing the last one."""
    assert facts["base"] < TOLERANCE, "before the first sync, engines serve the base model"
    assert max(facts["distances"]) < TOLERANCE
    assert min(facts["apart"]) > 100 * TOLERANCE, "each version must be another model"
    assert facts["versions"] == [[1], [2], [3]]
    assert facts["misplaced"] == [[], [], []]
    before, after = facts["fingerprints"]
    assert before == after
    # A and B of 15 layers in float32: two ranks times what each layer reads and writes.
    heads, feed = 10 * (64 + 128) + 10 * (64 + 64) + 10 * (128 + 64), 2 * 10 * (64 + 96) + 3 * (96 + 64)
    assert facts["bytes"] == [4 * (2 * (heads + feed) + 10 * (64 + 48))] * 3


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Facts of an engine that serves one adapter at a time."""
    return run(tmp_path_factory.mktemp("one"), "lora.py", "1", "1", ranks=2)


class TestOneVersion:
    pytestmark = ENGINES

    def test_versions_replace_each_other(self, one: dict[str, Any]) -> None:
        check_syncs(one)

    def test_requests_in_flight_go_over_at_the_very_token(self, one: dict[str, Any]) -> None:
        for spans, before, *behind in one["in flight"]:
            assert [version for version, _ in spans] == [3, 4, 5]
            assert before < TOLERANCE < max(behind)

    @pytest.mark.parametrize(
        ("what", "words"),
        [
            (
                "rank",
                "q_proj.lora_A.weight [17, 64] float32 has rank 17, and the engines take at most 16: set lora_rank",
            ),
            ("module", "embed_tokens is an embedding: leave it out of the adapter's target_modules"),
            ("size", "gate_proj.lora_B.weight [128, 10] float32"),
            ("size", "do not fit the engines' model.layers.0.mlp.gate_up_proj"),
            ("dora", "adapter 'default' has use_dora True"),
            ("pissa", "init_lora_weights 'pissa', which changes the base weights that the engines keep"),
            ("bias", "bias 'all', which changes the base weights that the engines keep"),
            ("saved", "modules_to_save ['lm_head']"),
            ("full", "engines with lora_rank keep their base weights and take adapters: pass the peft model"),
        ],
    )
    def test_what_engines_would_compute_differently_is_refused(
        self, one: dict[str, Any], what: str, words: str
    ) -> None:
        assert words in one["refused"][what]

    def test_what_needs_the_base_weights_is_refused(self, one: dict[str, Any]) -> None:
        assert "no adapter in its checkpoint to test: use sync(verify='full')" in one["self test"]
        assert "cannot restore its base weights with lora_rank: use sleep(level=1)" in one["sleep"]


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_with_two_versions_requests_stay_with_theirs_for_one_sync(tmp_path: Path) -> None:
    facts = run(tmp_path, "lora.py", "1", "2", ranks=2)
    check_syncs(facts)
    for spans, before, *behind in facts["in flight"]:
        # Nothing of the version in between, whose slot is the other one.
        versions = [version for version, _ in spans]
        assert all(later - version == 2 for version, later in pairwise(versions))
        if len(versions) == 1:
            # It was over before the next one came, or came after the first.
            continue
        assert before < TOLERANCE < max(behind)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    check_syncs(run(tmp_path, "lora.py", "2", "1", ranks=3))


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_engines_without_lora_get_the_adapter_folded_in(tmp_path: Path) -> None:
    facts = run(tmp_path, "lora_merged.py", ranks=2)
    assert max(facts["distances"]) < TOLERANCE
    assert min(facts["apart"]) > 100 * TOLERANCE
    assert facts["untouched"], "the trainer's base weights stay as they are"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", ["10", "0"])
def test_sharded_trainers(tmp_path: Path, rank: str) -> None:
    facts = run(tmp_path, "lora_sharded.py", rank, ranks=3)
    assert max(facts["distances"]) < TOLERANCE
    assert min(facts["apart"]) > 100 * TOLERANCE
    if rank != "0":
        assert "trainer ranks 0 and 1 disagree" in facts["scaling"]


@pytest.mark.vllm
def test_ranks_are_what_vllm_says() -> None:
    assert accepted_ranks() == RANKS


@pytest.mark.parametrize(("rank", "accepted"), [(1, 1), (2, 8), (8, 8), (10, 16), (257, 320), (512, 512)])
def test_ranks_are_rounded_up(rank: int, accepted: int) -> None:
    assert accepted_rank(rank, RANKS) == accepted


def test_too_large_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank 513 is more than vLLM accepts: at most 512"):
        accepted_rank(513, RANKS)
