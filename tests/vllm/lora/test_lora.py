"""Adapters of a peft model in real engines: log-probabilities are peft's own, and base weights stay as they are."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from adapters import adapted, train
from jobs import SharedJob
from lora import distance, groups_distance, misplaced, sync_twice_in_flight
from lora_sharded import Sharded
from models import build
from oracle import error_text
from torchrun import run_facts
from trainer import Trainer

from rollcast.rollout.lora import RANKS, accepted_rank, accepted_ranks

ENGINES = [pytest.mark.vllm, pytest.mark.timeout(300)]
TOLERANCE = 1e-4
# A and B of 15 layers in float32: two ranks times what each layer reads and writes.
HEADS_RANKED = 10 * (64 + 128) + 10 * (64 + 64) + 10 * (128 + 64)
FEED_RANKED = 2 * 10 * (64 + 96) + 3 * (96 + 64)
ADAPTER_BYTES = 4 * (2 * (HEADS_RANKED + FEED_RANKED) + 10 * (64 + 48))


def check_three_versions(job: SharedJob) -> None:
    """Three versions, each replacing the last one; the base weights stay."""
    trainer, model = job.trainer, job.trainer.model
    versions = trainer.job.config.lora_versions
    before_first_sync = groups_distance(trainer.at_start.groups, build("untied"))
    assert before_first_sync < TOLERANCE, "before the first sync, engines serve the base model"
    for seed, (mode, verify) in enumerate([("in_place", "full"), ("in_place", "checksum"), ("shadow", "full")], 1):
        old, version = copy.deepcopy(model), trainer.version + 1
        train(model, seed=seed)
        assert trainer.sync(mode=mode, verify=verify).nbytes == ADAPTER_BYTES
        assert distance(trainer.job, model) < TOLERANCE
        assert distance(trainer.job, old) > 100 * TOLERANCE, "each version must be another model"
        (workers,) = trainer.pool.call_workers("lora_stacks")
        assert misplaced(model, workers, version % versions) == []
        assert [engine.version for engine in trainer.pool.describe()] == [version]
    assert trainer.pool.fingerprints() == trainer.at_start.fingerprints


class TestOneVersion:
    pytestmark = ENGINES

    def test_versions_replace_each_other(self, lora: SharedJob) -> None:
        check_three_versions(lora)

    def test_requests_in_flight_go_over_at_the_very_token(self, lora: SharedJob) -> None:
        first = sync_trained(lora.trainer)
        requests = sync_twice_in_flight(lora.trainer)
        assert len(requests) == 2
        for request in requests:
            assert request.versions == [first, first + 1, first + 2]
            assert request.before < TOLERANCE < max(request.behind)

    @pytest.mark.parametrize(
        ("settings", "texts"),
        [
            (
                {"r": 17},
                ["q_proj.lora_A.weight [17, 64] float32 has rank 17, and the engines take at most 16: set lora_rank"],
            ),
            (
                {"target_modules": ["q_proj", "embed_tokens"]},
                ["embed_tokens is an embedding: leave it out of the adapter's target_modules"],
            ),
            ({"use_dora": True}, ["adapter 'default' has use_dora True"]),
            (
                {"init_lora_weights": "pissa"},
                ["init_lora_weights 'pissa', which changes the base weights that the engines keep"],
            ),
            ({"bias": "all"}, ["bias 'all', which changes the base weights that the engines keep"]),
            ({"modules_to_save": ["lm_head"]}, ["modules_to_save ['lm_head']"]),
        ],
        ids=["rank", "module", "dora", "pissa", "bias", "saved"],
    )
    def test_what_engines_would_compute_differently_is_refused(
        self, lora: SharedJob, settings: dict[str, Any], texts: list[str]
    ) -> None:
        check_refused(lora.trainer, adapted(**settings), texts)

    def test_an_adapter_of_another_size_is_refused(self, lora: SharedJob) -> None:
        wide = adapted(base=build("untied", intermediate_size=128))
        texts = ["gate_proj.lora_B.weight [128, 10] float32", "do not fit the engines' model.layers.0.mlp.gate_up_proj"]
        check_refused(lora.trainer, wide, texts)

    def test_full_weights_are_refused(self, lora: SharedJob) -> None:
        text = "engines with lora_rank keep their base weights and take adapters: pass the peft model"
        check_refused(lora.trainer, build("untied"), [text])

    def test_what_needs_the_base_weights_is_refused(self, lora: SharedJob) -> None:
        trainer = lora.trainer
        self_test = error_text(trainer.broadcaster.self_test)
        assert "no adapter in its checkpoint to test: use sync(verify='full')" in self_test
        sleep = error_text(lambda: trainer.pool.sleep(level=2))
        assert "cannot restore its base weights with lora_rank: use sleep(level=1)" in sleep


def check_refused(trainer: Trainer, model: Any, texts: list[str]) -> None:
    problem = error_text(lambda: trainer.open_broadcaster(model).sync(version=trainer.version + 1))
    assert all(text in problem for text in texts), problem


def sync_trained(trainer: Trainer) -> int:
    """Sync an adapter that does something; its version."""
    train(trainer.model, seed=1)
    return trainer.sync().version


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_with_two_versions_requests_stay_with_theirs_for_one_sync(lora_two_versions: SharedJob) -> None:
    sync_trained(lora_two_versions.trainer)
    requests = sync_twice_in_flight(lora_two_versions.trainer)
    assert len(requests) == 2
    for request in requests:
        # Nothing of the version in between, whose slot is the other one.
        assert all(later - version == 2 for version, later in pairwise(request.versions))
        if len(request.versions) == 1:
            # It was over before the next one came, or came after the first.
            continue
        assert request.before < TOLERANCE < max(request.behind)


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_with_two_versions_each_sync_lands_in_the_other_slot(lora_two_versions: SharedJob) -> None:
    check_three_versions(lora_two_versions)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_tensor_parallel_ranks(lora_two_workers: SharedJob) -> None:
    check_three_versions(lora_two_workers)


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_engines_without_lora_get_the_adapter_folded_in(one_engine: SharedJob) -> None:
    trainer, model = one_engine.trainer, adapted()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    broadcaster = trainer.open_broadcaster(model)
    broadcaster.self_test()
    for seed in (1, 2):
        train(model, seed=seed)
        assert distance(trainer.job, model) > 100 * TOLERANCE
        trainer.sync(verify="full")
        assert distance(trainer.job, model) < TOLERANCE
    weights = model.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in base.items()), "the trainer's base weights stay"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", ["10", "0"])
def test_sharded_trainers(tmp_path: Path, rank: str) -> None:
    build("untied").save_pretrained(tmp_path / "model")
    facts = msgspec.convert(run_facts("lora_sharded.py", tmp_path, rank, ranks=3, timeout_s=280), Sharded)
    assert max(facts.distances) < TOLERANCE
    assert min(facts.distances_from_base) > 100 * TOLERANCE
    if rank != "0":
        assert "trainer ranks 0 and 1 disagree" in facts.scaling_problem


@pytest.mark.vllm
def test_ranks_are_what_vllm_says() -> None:
    assert accepted_ranks() == RANKS


@pytest.mark.parametrize(("rank", "accepted"), [(1, 1), (2, 8), (8, 8), (10, 16), (257, 320), (512, 512)])
def test_ranks_are_rounded_up(rank: int, accepted: int) -> None:
    assert accepted_rank(rank, RANKS) == accepted


def test_too_large_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank 513 is more than vLLM accepts: at most 512"):
        accepted_rank(513, RANKS)
