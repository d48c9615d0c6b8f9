"""Deterministic engines: the same calls in the same order give the same tokens; nothing waits for ever."""

from pathlib import Path
from typing import Any

import pytest
from models import build
from torchrun import run_facts_of_trainers

from rollcast.launch.grpo.options import parse
from rollcast.rollout import PreflightError, RolloutConfig, Sampling
from rollcast.rollout.pool.dispatcher import DeterministicRequests
from rollcast.rollout.pool.router import Router

vllm = pytest.mark.vllm


def run(folder: Path) -> list[dict[str, Any]]:
    """What each trainer rank has found. Their batches meet in the engine, in whatever order."""
    build("untied").save_pretrained(folder / "model")
    return run_facts_of_trainers("deterministic.py", folder, trainers=2, ranks=4, timeout_s=250)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return [run(tmp_path_factory.mktemp("run")) for _ in range(2)]


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def runs(both: list[list[dict[str, Any]]], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return [found[request.param] for found in both]


@vllm
@pytest.mark.timeout(600)
def test_two_runs_draw_the_same_tokens(runs: list[dict[str, Any]]) -> None:
    one, other = runs
    for name in ("tokens", "streamed", "seeded", "drawn"):
        assert one[name] == other[name], name


@vllm
def test_trainer_ranks_draw_different_ones(both: list[list[dict[str, Any]]]) -> None:
    (first, second), _ = both
    assert first["tokens"] != second["tokens"] and first["seeded"] == second["seeded"]


@vllm
def test_requests_of_one_run_draw_different_ones_unless_they_are_seeded(runs: list[dict[str, Any]]) -> None:
    for found in runs:
        assert found["seeded"][0] == found["seeded"][1]
        assert found["drawn"][0] != found["drawn"][1] != found["tokens"]
        assert all(one != other for one, other in found["tokens"])


@vllm
def test_what_waits_for_its_turn_can_be_aborted(runs: list[dict[str, Any]]) -> None:
    for found in runs:
        assert found["aborted"] == ["abort"] * 3
        assert len(found["streamed"]) == 900


@vllm
def test_mistakes_leave_nothing_behind_that_others_wait_for(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["mistake"].startswith("ValueError: request 'a' is under way")
    assert runs[0]["async"].startswith("ValueError: deterministic engines need on_policy()")


def test_seeds_hang_on_seed_and_rank_and_are_the_users_first() -> None:
    def drawn(seed: int, rank: int) -> list[int | None]:
        repeatable = DeterministicRequests(seed, rank=rank)
        return [repeatable.seeded(Sampling()).seed for _ in range(3)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({*drawn(1, 0), *drawn(1, 1), *drawn(2, 0)}) == 9
    assert DeterministicRequests(1, rank=0).seeded(Sampling(seed=7)).seed == 7


def test_engines_take_turns() -> None:
    router = Router(3, first=1, in_turn=True)
    assert [router.start([5] * 64, tokens=size) for size in (900, 1, 1, 1, 50)] == [1, 2, 0, 1, 2]


def test_what_cannot_be_deterministic_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PreflightError, match="deterministic engines have no prefix cache"):
        RolloutConfig(model="", dtype="float32", deterministic=True, engine_args={"enable_prefix_caching": True})
    with pytest.raises(SystemExit):
        parse(["--deterministic", "--mode", "async"])
    assert "deterministic needs mode on_policy" in capsys.readouterr().err
