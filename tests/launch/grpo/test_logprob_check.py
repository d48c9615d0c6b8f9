"""The log-probability check of the main job: engines are checked one by one."""

import math

import pytest
import torch

from rollcast.launch.grpo.logprob_check import LogprobError, LogprobGap, check_logprobs
from rollcast.launch.grpo.parallel import Trainers

ENGINES = 8


def check(by_engine: dict[int, list[float]], *, tolerance: float = 1e-3) -> LogprobGap:
    differences = [difference for values in by_engine.values() for difference in values]
    owners = [engine for engine, values in by_engine.items() for _ in values]
    return check_logprobs(
        torch.tensor(differences, dtype=torch.float32),
        torch.tensor(owners, dtype=torch.int64),
        Trainers(rank=0, size=1, device="cpu"),
        engines=ENGINES,
        tolerance=tolerance,
        version=4,
    )


def test_single_tokens_may_differ_by_more_than_the_average() -> None:
    gap = check({0: [1e-4] * 99, 5: [2e-4] * 99 + [2e-2]})
    assert gap.mean_diff == pytest.approx(3.98e-4, rel=1e-3)
    assert gap.max_diff == pytest.approx(2e-2)


def test_one_engine_with_old_weights_does_not_disappear_among_many() -> None:
    by_engine = {engine: [1e-4] * 100 for engine in range(ENGINES)} | {6: [4e-3] * 100}
    assert sum(map(sum, by_engine.values())) / 800 < 1e-3, "the average of all is below the tolerance"
    with pytest.raises(LogprobError, match=r"by 4\.00e-03 on average.* engine 6 are not the trainer's version 4"):
        check(by_engine)


def test_one_token_of_few_may_be_the_one_that_differs_much() -> None:
    assert check({0: [1e-4] * 100, 3: [1e-4, 2e-2, 1e-4, 1e-4]}).mean_diff == pytest.approx(5.075e-3)
    with pytest.raises(LogprobError, match="engine 3 "):
        check({0: [1e-4] * 100, 3: [2e-2] * 4})


def test_infinite_differences_exceed_any_tolerance() -> None:
    with pytest.raises(LogprobError, match="engine 1 "):
        check({0: [0.0], 1: [0.0, math.inf]}, tolerance=math.inf)


def test_engines_without_a_token_are_not_checked() -> None:
    assert check({}) == LogprobGap(None, None)
    assert check({7: [0.0]}) == LogprobGap(0.0, 0.0)
