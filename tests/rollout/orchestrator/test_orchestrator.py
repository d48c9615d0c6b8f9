"""The orchestrator with real threads and random timings: ranks stay in step, phases overlap, every end is clean."""

import os
import signal
import threading
import time
from typing import Any

import pytest
from rehearsal import LONG_S, GeneratedPart, Rehearsal, generating

from rollcast.comm import agreement
from rollcast.rollout import Mode, OrchestratorError, Outcome, async_, on_policy, one_step_off
from rollcast.rollout.orchestrator import generation

MODES = [
    on_policy(),
    one_step_off(),
    async_(max_staleness=1),
    async_(max_staleness=3),
    async_(max_staleness=3, stale="drop"),
]
SOON_S = 5.0


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(agreement, "MARGIN_S", 0.2)
    yield
    assert generating() == []


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.name}-{mode.max_staleness}-{mode.stale}")
@pytest.mark.parametrize("ranks", [1, 3])
def test_all_ranks_do_the_same_in_the_same_order(mode: Mode, ranks: int) -> None:
    for seed in range(3):
        job = Rehearsal(ranks, longest_s=0.1, seed=seed)
        outcomes = job.run(mode, steps=12)
        assert outcomes == [Outcome(trained=12, dropped=outcomes[0].dropped, version=12)] * ranks
        assert job.logs == [job.logs[0]] * ranks
        assert max(age for ages in job.ages for age in ages.values()) <= mode.max_staleness
        dropped = [event for event in job.logs[0] if event.startswith("drop")]
        assert len(dropped) == outcomes[0].dropped and (not dropped or mode.stale == "drop")
        for generated in job.generated:
            assert sorted(generated) == list(range(12 + len(dropped))), "every batch once, on every rank"


@pytest.mark.parametrize("seed", [1, 2])
def test_on_policy_is_one_after_the_other_and_the_same_again(seed: int) -> None:
    job, busy = Rehearsal(2, longest_s=0.05, seed=seed), threading.Event()
    job.hooks["generate"] = lambda rank, batch: expect(not busy.is_set())
    job.hooks["train"] = lambda rank, batch: busy.set()
    job.hooks["sync"] = lambda rank, version: busy.clear()
    job.run(on_policy(), steps=3)
    assert job.logs[0] == ["train 0", "sync 1", "train 1", "sync 2", "train 2", "sync 3"]


def expect(holds: bool) -> None:
    assert holds


@pytest.mark.parametrize("mode", MODES[1:], ids=lambda mode: f"{mode.name}-{mode.stale}")
def test_the_next_batch_is_generated_while_one_is_trained_on(mode: Mode) -> None:
    job, begun = Rehearsal(1), [threading.Event() for _ in range(9)]
    job.hooks["generate"] = lambda rank, batch: begun[batch].set()
    job.hooks["train"] = lambda rank, batch: expect(batch == 2 or begun[batch + 1].wait(SOON_S))
    job.run(mode, steps=3)


def test_one_step_off_syncs_when_the_next_batch_is_there() -> None:
    job = Rehearsal(2, longest_s=0.1)
    job.hooks["sync"] = lambda rank, version: expect(generating() == [])
    job.run(one_step_off(), steps=6)
    assert [job.ages[0][batch] for batch in range(6)] == [0, 1, 1, 1, 1, 1]


def test_async_syncs_while_requests_are_in_flight() -> None:
    job, synced = Rehearsal(1), threading.Event()

    def generate(rank: int, batch: int) -> None:
        # Batch 2 begins before the second sync and ends behind it.
        assert batch != 2 or synced.wait(SOON_S)

    job.hooks["generate"] = generate
    job.hooks["sync"] = lambda rank, version: synced.set() if version == 2 else None
    job.run(async_(max_staleness=1), steps=3)


def test_a_batch_is_as_old_as_its_oldest_token_on_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    job, third = Rehearsal(2), threading.Event()

    def generate(rank: int, batch: int) -> GeneratedPart:
        begun = job.version
        # Batch 1 is generated after the third sync; on rank 0 all its tokens are of that version.
        assert batch != 1 or third.wait(SOON_S)
        return GeneratedPart(batch, begun if rank else job.version)

    monkeypatch.setattr(job, "generate", generate)
    job.hooks["train"] = lambda rank, batch: third.set() if job.version == 3 else None
    assert [outcome.dropped for outcome in job.run(async_(max_staleness=2, stale="drop"), steps=6)] == [1, 1]
    assert all("drop 1" in log for log in job.logs)


def test_a_rank_that_waits_leaves_the_processor_to_others() -> None:
    job = Rehearsal(1)
    job.hooks["generate"] = lambda rank, batch: time.sleep(0.5)
    job.run(on_policy(), steps=1)
    assert 0 < job.waits[0] <= 12


@pytest.mark.parametrize("where", ["generate", "train", "sync"])
@pytest.mark.parametrize("mode", [on_policy(), one_step_off(), async_(max_staleness=2)], ids=lambda mode: mode.name)
def test_what_one_rank_raises_ends_all_ranks(mode: Mode, where: str) -> None:
    for failing in (0, 1):
        # Who is in a collective call with the failing rank is ended by whoever provides that.
        job = Rehearsal(2, longest_s=0.02, collective=where == "generate")

        def fail(rank: int, number: int, failing: int = failing) -> None:
            if (rank, number) == (failing, 2):
                raise ArithmeticError("too hot")

        job.hooks[where] = fail
        started = time.monotonic()
        runs = job.start(mode, steps=9)
        assert isinstance(runs[failing].exception(SOON_S), ArithmeticError)
        error = runs[1 - failing].exception(SOON_S)
        assert isinstance(error, OrchestratorError)
        assert str(error) == f"trainer rank {failing}: ArithmeticError: too hot"
        assert time.monotonic() - started < SOON_S


@pytest.mark.parametrize("where", ["generate", "train", "sync"])
def test_an_error_ends_what_is_generated_meanwhile(where: str) -> None:
    job = Rehearsal(1)

    def generate(rank: int, batch: int) -> None:
        if batch == 1:
            assert job.cancelled.wait(LONG_S)
            raise OSError("cancelled")

    def fail(rank: int, number: int) -> None:
        raise ArithmeticError("too hot")

    job.hooks = {"generate": generate} | ({where: fail} if where != "generate" else {})
    if where == "generate":
        job.hooks["generate"] = lambda rank, batch: fail(rank, batch) if batch == 0 else generate(rank, batch)
    (run,) = job.start(async_(max_staleness=1), steps=9)
    with pytest.raises(ArithmeticError, match="too hot"):
        run.result(SOON_S)
    assert job.cancelled.is_set()


@pytest.mark.parametrize("where", ["waiting", "training"])
def test_ctrl_c_ends_the_run(where: str) -> None:
    job = Rehearsal(1)
    # Where the tests run in the background, it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    stuck = 0 if where == "waiting" else 1
    job.hooks["generate"] = lambda rank, batch: expect(batch != stuck or job.cancelled.wait(LONG_S))
    job.hooks["train"] = lambda rank, batch: time.sleep(LONG_S)
    interrupt.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        job.orchestrator(0, async_(max_staleness=1)).run(steps=3)
    assert time.monotonic() - started < SOON_S


def test_a_call_that_cannot_be_ended_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generation, "LEAVE_S", 0.2)
    job, stuck = Rehearsal(1), threading.Event()

    def generate(rank: int, batch: int) -> None:
        if batch == 0:
            raise ArithmeticError("too hot")
        stuck.wait(LONG_S)

    job.hooks["generate"] = generate
    started = time.monotonic()
    with pytest.raises(ArithmeticError, match="too hot"):
        job.orchestrator(0, async_(max_staleness=1)).run(steps=3)
    assert time.monotonic() - started < SOON_S
    assert "generating batch 1 did not end within 0.2 s" in caplog.text
    stuck.set()
    while generating():
        time.sleep(0.01)


def test_a_rank_that_does_not_come_is_named() -> None:
    job = Rehearsal(2)
    with pytest.raises(OrchestratorError, match=r"did not start: trainer rank 1 did not come within 0\.3 s"):
        job.orchestrator(0, on_policy(), timeout_s=0.3).run(steps=3)
    job = Rehearsal(2)
    with pytest.raises(OrchestratorError, match=r"did not start: trainer rank 0 did not come within 0\.3 s"):
        job.orchestrator(1, on_policy(), timeout_s=0.3).run(steps=3)


def test_a_rank_that_stays_away_later_is_named() -> None:
    job = Rehearsal(2, collective=False)
    job.hooks["train"] = lambda rank, batch: time.sleep(1.5 * rank)
    errors = [run.exception(SOON_S) for run in job.start(on_policy(), steps=3, timeout_s=0.3)]
    assert "lost each other: trainer rank 1 did not come within 0.3 s" in str(errors[0])
    assert isinstance(errors[1], OrchestratorError)


@pytest.mark.parametrize("other", [on_policy(), async_(max_staleness=2, stale="drop")], ids=lambda mode: mode.name)
def test_ranks_must_want_the_same(other: Mode) -> None:
    for run in Rehearsal(2).start(async_(max_staleness=2), other, steps=3):
        with pytest.raises(ValueError, match="trainer ranks 0 and 1 disagree"):
            run.result(SOON_S)


def test_what_has_no_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Rehearsal(1)
    monkeypatch.setattr(job, "generate", lambda rank, batch: None)
    with pytest.raises(AttributeError, match="oldest_version"):
        job.orchestrator(0, on_policy()).run(steps=1)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Rehearsal(1).orchestrator(0, on_policy()).run(steps=0)
