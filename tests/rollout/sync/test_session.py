"""Parts of one attempt: how its time is divided, and what ranks make of failures."""

import pytest
from torch import distributed as dist

from rollcast.comm import Deadline
from rollcast.comm.agreement import Agreement
from rollcast.rollout import EngineError, SyncError
from rollcast.rollout.errors import Failure
from rollcast.rollout.sync.outcome import StepOutcome, agree_on, merge
from rollcast.rollout.sync.session import TimeBudget

LOST = Failure(text="lost", engine=1, phase="receive")
LATE = Failure(text="too late", phase="send")


def test_every_step_leaves_time_for_those_after_it() -> None:
    budget = TimeBudget.start(60.0)
    joined, transferred, total = budget.join.timeout_s, budget.transfer.timeout_s, budget.total.timeout_s
    assert 0 < joined < transferred < transferred + budget.failure_report_s < total == 60.0
    assert budget.commit().timeout_s < budget.total.left_s()


def test_an_outcome_keeps_the_failures_of_engines_and_makes_one_of_any_other_error() -> None:
    error = EngineError("engine 1 refuses", failures=[LOST])
    assert StepOutcome.of_error(error, phase="commit") == StepOutcome((LOST,), "engine 1 refuses")
    assert StepOutcome.of_error(KeyError(), phase="join").failures == (Failure(text="KeyError", phase="join"),)
    with pytest.raises(SyncError, match="engine 1 refuses") as caught:
        StepOutcome.of_error(error, phase="commit").raise_failures()
    assert caught.value.failures == (LOST,) and caught.value.engine == 1
    StepOutcome().raise_failures()
    lost = EngineError(failures=[Failure(text="lost", engine=1)])
    assert StepOutcome.of_error(lost, phase="receive").failures == (LOST,)


@pytest.mark.parametrize(
    ("outcomes", "merged"),
    [
        ([StepOutcome(), StepOutcome()], StepOutcome()),
        ([StepOutcome(), StepOutcome((LATE,), "too late")], StepOutcome((LATE,), "too late")),
        (
            [StepOutcome((LOST,), "b"), StepOutcome(), StepOutcome((LATE,), "a"), StepOutcome((LOST,), "b")],
            StepOutcome((LOST, LATE), "b\na"),
        ),
    ],
    ids=["none", "one rank", "several ranks"],
)
def test_different_failures_of_all_ranks_are_kept_once(outcomes: list[StepOutcome], merged: StepOutcome) -> None:
    assert merge(outcomes) == merged


def test_a_rank_that_is_late_is_a_failure_of_the_step() -> None:
    agreement = Agreement(dist.HashStore(), rank=0, size=2)
    outcome = agree_on(agreement, "step", StepOutcome(), deadline=Deadline(0.1))
    text = "trainer rank 1 did not come within 0.1 s"
    assert outcome == StepOutcome((Failure(text=text, phase="agree"),), text)
