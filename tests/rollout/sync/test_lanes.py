"""Several trainer ranks, several lanes: all ranks succeed together or fail together, in time, with the cause."""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from engines import Engines, Trainers
from ranks import Weights
from sides import check_same_bytes, within

from rollcast.comm import SyncReport
from rollcast.rollout import SyncError
from rollcast.rollout.protocol.messages import Abandon, Commit, JoinGroup, Receive, Settle

pytestmark = pytest.mark.timeout(120)
# Much less than the deadline. Where the resolver is slow, a connection to a store can take 5 s.
SOON_S = 20.0
Start = Callable[..., Trainers]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Trainers] = []

    def trainers(engines: Engines, weights: Weights, **settings: Any) -> Trainers:
        made.append(Trainers(weights, engines, **{"count": 2} | settings))
        return made[-1]

    yield trainers
    for each in made:
        each.close()


def weights_of(seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    return {f"p{index}": torch.randn(4 * index + 4, 60) for index in range(6)}


def check_landed(engines: Engines, weights: Weights) -> None:
    for workers in engines.workers:
        for worker in workers:
            parts = {name: whole.chunk(engines.size)[worker.index] for name, whole in weights.items()}
            check_same_bytes(worker.memory.tensors, parts)


def check_failed(results: list[Any], words: str) -> None:
    for error in results:
        assert isinstance(error, SyncError), error
        assert words in str(error)


def check_ok(results: list[Any]) -> None:
    for report in results:
        assert isinstance(report, SyncReport), report


def in_step(trainers: Trainers) -> bool:
    return len({source.walks for source in trainers.sources}) == 1


@pytest.mark.parametrize("verify", ["none", "checksum", "full"])
@pytest.mark.parametrize(("count", "size"), [(1, 2), (2, 2), (3, 2), (2, 1)])
def test_every_worker_gets_its_part_from_its_sender(start: Start, count: int, size: int, verify: str) -> None:
    engines, weights = Engines(2, size), weights_of()
    trainers = start(engines, weights, count=count)
    for version in (1, 2, 3):
        for name, value in weights_of(version).items():
            weights[name].copy_(value)
        check_ok(trainers.sync({"version": version, "verify": verify}))
        check_landed(engines, weights)
        assert engines.versions == {0: version, 1: version}
    assert in_step(trainers) and trainers.sources[0].walks == 3 * (2 if verify == "full" else 1)
    senders = {its.sender for request in engines.seen if isinstance(request, JoinGroup) for its in request.assignments}
    assert senders == {lane % count for lane in range(size)}


@pytest.mark.parametrize("verify", ["none", "full"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_worker_that_fails_in_a_sync_fails_all_ranks_at_once(start: Start, broken: int, verify: str) -> None:
    engines, weights = Engines(2, 2), weights_of()
    trainers = start(engines, weights)
    check_ok(trainers.sync({"version": 1}))
    engines.fault = lambda engine, worker, request: fail(
        isinstance(request, Receive) and (engine, worker) == (1, broken)
    )
    with within(SOON_S):
        check_failed(trainers.sync({"version": 2, "verify": verify}), "engine 1: it was told to fail")
    assert in_step(trainers) and engines.versions == {0: 1, 1: 1}
    assert sum(isinstance(request, Abandon) for request in engines.seen) == 2
    engines.fault = lambda *_: None
    weights["p0"].zero_()
    check_ok(trainers.sync({"version": 3}))
    check_landed(engines, weights)


@pytest.mark.parametrize("broken", [0, 1])
def test_an_engine_that_cannot_commit_fails_all_ranks_and_nobody_settles(start: Start, broken: int) -> None:
    engines = Engines(2, 1)
    trainers = start(engines, weights_of())
    check_ok(trainers.sync({"version": 1}))
    engines.fault = lambda engine, worker, request: fail(isinstance(request, Commit) and engine == broken)
    with within(SOON_S):
        check_failed(trainers.sync({"version": 2}), f"engine {broken}: it was told to fail")
    assert sum(isinstance(request, Settle) for request in engines.seen) == 2, "those of version 1"
    assert sum(isinstance(request, Abandon) for request in engines.seen) == 2
    engines.fault = lambda *_: None
    check_ok(trainers.sync({"version": 2}))
    assert engines.versions == {0: 2, 1: 2}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_worker_that_cannot_join_is_heard_of_at_once_by_all_ranks(start: Start, broken: int) -> None:
    engines = Engines(2, 2)
    engines.fault = lambda engine, worker, request: fail(
        isinstance(request, JoinGroup) and (engine, worker) == (1, broken)
    )
    trainers = start(engines, weights_of())
    with within(SOON_S):
        check_failed(trainers.sync({"version": 1}), "engine 1: it was told to fail")
    engines.fault = lambda *_: None
    check_ok(trainers.sync({"version": 1}))


def test_a_worker_that_never_joins_is_named_on_all_ranks_in_time(start: Start) -> None:
    engines = Engines(2, 2)
    engines.fault = lambda engine, worker, request: delay(isinstance(request, JoinGroup) and (engine, worker) == (1, 1))
    trainers = start(engines, weights_of(), sync_timeout_s=12.0)
    with within(13.0):
        check_failed(trainers.sync({"version": 1}), "engine 1 did not")


def test_plans_may_be_larger_than_the_store_takes_at_once(start: Start) -> None:
    engines, weights = Engines(1, 2, ballast=5 << 20), weights_of()
    check_ok(start(engines, weights).sync({"version": 1}))
    check_landed(engines, weights)


def test_ranks_that_ask_for_different_verification_are_told_so(start: Start) -> None:
    engines = Engines(1, 2)
    trainers = start(engines, weights_of())
    for error in trainers.sync({"version": 1, "verify": "full"}, {"version": 1, "verify": "none"}):
        assert isinstance(error, ValueError) and "verify full" in str(error) and "verify none" in str(error)
    check_ok(trainers.sync({"version": 1}))


def test_a_refused_call_on_one_rank_leaves_the_ranks_in_step(start: Start) -> None:
    trainers = start(Engines(1, 1), weights_of(), trainer_timeout_s=1.0)
    late, refused = trainers.sync({"version": 1}, {"version": 1, "verify": "twice"})
    assert "trainer rank 1 did not come" in str(late) and "twice" in str(refused)
    check_ok(trainers.sync({"version": 1}))


def test_failed_and_mended_syncs_leave_nothing_behind(start: Start) -> None:
    engines = Engines(2, 2)
    trainers = start(engines, weights_of())
    used: dict[int, int] = {}
    for version in range(1, 11):
        kind = (Commit, Receive)[version % 2]
        engines.fault = lambda engine, worker, request, kind=kind: fail(isinstance(request, kind) and worker == 1)
        results = trainers.sync({"version": version})
        assert isinstance(results[0], SyncReport) is (kind is Commit), results
        if kind is Commit:
            used[version] = resources()
    assert used[10] <= used[2], used


def resources() -> int:
    """Open files, when the errors' tracebacks are gone."""
    gc.collect()
    time.sleep(0.2)
    return psutil.Process().num_fds()


def fail(now: bool) -> None:
    if now:
        raise RuntimeError("it was told to fail")


def delay(now: bool) -> None:
    if now:
        time.sleep(14.0)
