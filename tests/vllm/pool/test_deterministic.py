"""Deterministic engines: the same calls in the same order give the same tokens; nothing waits for ever."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
from deterministic import STREAMED, Run
from models import build
from torchrun import run_facts_of_trainers

from rollcast.launch.grpo.options import parse
from rollcast.rollout import PreflightError, RolloutConfig, Sampling
from rollcast.rollout.pool.dispatcher import DeterministicRequests
from rollcast.rollout.pool.router import Router

vllm = pytest.mark.vllm


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trainer rank writes: its run, and the error of a call after the job."""

    run: Run
    closed: str


def run_job_twice(folders: pytest.TempPathFactory) -> Iterator[list[Report]]:
    """Reports by trainer rank. Their batches meet in the engine, in whatever order."""
    for _ in range(2):
        folder = folders.mktemp("run")
        build("untied").save_pretrained(folder / "model")
        reports = run_facts_of_trainers("deterministic.py", folder, trainers=2, ranks=4, timeout_s=250)
        yield [msgspec.convert(report, Report) for report in reports]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[list[Report]]:
    return [*run_job_twice(tmp_path_factory)]


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def runs(both: list[list[Report]], request: pytest.FixtureRequest) -> list[Run]:
    """The runs of one rank, in both jobs."""
    return [reports[request.param].run for reports in both]


@vllm
@pytest.mark.timeout(600)
def test_two_runs_draw_the_same_tokens(runs: list[Run]) -> None:
    one, other = runs
    assert one.tokens == other.tokens
    assert one.streamed == other.streamed
    assert one.seeded == other.seeded
    assert one.drawn == other.drawn


@vllm
def test_trainer_ranks_draw_different_ones(both: list[list[Report]]) -> None:
    (first, second), _ = both
    assert first.run.tokens != second.run.tokens and first.run.seeded == second.run.seeded


@vllm
def test_requests_of_one_run_draw_different_ones_unless_they_are_seeded(runs: list[Run]) -> None:
    for run in runs:
        assert run.seeded[0] == run.seeded[1]
        assert run.drawn[0] != run.drawn[1] != run.tokens
        assert all(one != other for one, other in run.tokens)


@vllm
def test_what_waits_for_its_turn_can_be_aborted(runs: list[Run]) -> None:
    for run in runs:
        assert run.aborted == ["abort"] * 3
        assert len(run.streamed) == STREAMED.max_tokens


@vllm
def test_mistakes_leave_nothing_behind_that_others_wait_for(runs: list[Run]) -> None:
    assert runs[0].mistake.startswith("ValueError: request 'a' is under way")
    assert runs[0].async_mode.startswith("ValueError: deterministic engines need on_policy()")


@vllm
def test_the_pool_is_closed_when_the_job_is_over(both: list[list[Report]]) -> None:
    for reports in both:
        assert all(report.closed.startswith("EngineError: the pool is closed") for report in reports)


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
