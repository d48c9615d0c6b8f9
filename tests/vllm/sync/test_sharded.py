"""Two workers of one engine: the trainers' mistakes, damage on one lane, and weights that vLLM moves meanwhile."""

import re

import pytest
from jobs import SharedJob
from sharded import K_PROJ, MISTAKES, sync_mistake
from states import EngineState, Outcome, sync_with_fault, sync_with_unseen_fault
from trainer import Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

PROBLEMS = {
    "missing": f"would not be written: .*{K_PROJ}",
    "extra": r"does not take parameter model\.odd\.weight \[3\] float32",
    "another shape": rf"does not take parameter {K_PROJ} \[64, 63\]",
    "another kind": rf"the trainer's {K_PROJ} \[64, 64\] int64 does not fit into torch\.float32",
}


def sync(job: SharedJob, fault: str = "", **options: str) -> Outcome:
    """One sync of the weights as they are, with this fault; every trainer rank sees the same."""
    first, *others = job.on_trainers(sync_with_fault, fault, options)
    assert all(other.state == first.state for other in others)
    assert all((other.problem == "") is (first.problem == "") for other in others)
    return first


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_sent(two_trainers: SharedJob, mistake: str) -> None:
    version = two_trainers.trainer.version
    for outcome in two_trainers.on_trainers(sync_mistake, mistake):
        assert re.search(PROBLEMS[mistake], outcome.problem)
        assert outcome.state == EngineState(version=version, refuses=False)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_flipped_bit_on_one_lane_names_the_message_and_sets_no_version(two_trainers: SharedJob, worker: int) -> None:
    two_trainers.on_trainers(Trainer.perturb)
    version = two_trainers.trainer.version
    outcome = sync(two_trainers, f"flip {worker}", verify="checksum")
    assert re.search(
        rf"worker {worker}: message \d+ of lane \d+ \(\S+\[\d+:\d+\]\): checksum mismatch", outcome.problem
    )
    assert outcome.state == EngineState(version=version, refuses=True)


def test_weights_that_moved_are_followed(two_trainers: SharedJob) -> None:
    two_trainers.on_trainers(Trainer.perturb)
    before = sync(two_trainers, verify="full")
    after = sync(two_trainers, "move")
    assert after.problem == "" and after.fingerprints == before.fingerprints


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_weights_that_move_though_nothing_has_moved_them_fail_the_sync(two_trainers: SharedJob, mode: str) -> None:
    two_trainers.on_trainers(Trainer.perturb)
    before = sync(two_trainers, verify="full")
    unseen, *_ = two_trainers.on_trainers(sync_with_unseen_fault, "move unseen", {"mode": mode})
    assert "was moved while weights were on their way: sync again" in unseen.problem
    after = sync(two_trainers)
    assert after.problem == "" and after.fingerprints == before.fingerprints


def test_weights_that_changed_their_layout_are_refused(two_trainers: SharedJob) -> None:
    two_trainers.trainer.pool.call_workers("keep_q_norm")
    before = sync(two_trainers)
    changed = sync(two_trainers, "move to bfloat16")
    assert "was replaced and the weights now land elsewhere" in changed.problem
    for_good = sync(two_trainers)
    assert "model.layers.0.self_attn.q_norm.weight: vLLM keeps it in another layout" in for_good.problem
    assert for_good.state == EngineState(version=before.state.version, refuses=True)
    # Back where they were, they are followed again.
    two_trainers.trainer.pool.call_workers("restore_q_norm")
    restored = sync(two_trainers)
    assert restored.problem == "" and restored.fingerprints == before.fingerprints
