"""Several trainer ranks, several lanes: all ranks succeed together or fail together, in time, with the cause."""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from engines import Engines, Trainers, gathering
from ranks import Weights
from sides import check_same_bytes, within
from torch import distributed as dist

from rollcast.comm import Deadline, SyncReport, WeightSource
from rollcast.comm.agreement import Agreement
from rollcast.rollout import EngineError, RolloutConfig, SyncError
from rollcast.rollout.errors import Failure
from rollcast.rollout.protocol.messages import AbortSync, Commit, Finalize, JoinGroup, Prepare, Receive
from rollcast.rollout.sync.lanes import Lanes

pytestmark = pytest.mark.timeout(120)
# Much less than the deadline. Where the resolver is slow, a connection to a store can take 5 s.
SOON_S = 20.0
Start = Callable[..., Trainers]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Trainers] = []

    def trainers(engines: Engines, weights: Weights | list[Weights], *, count: int = 2, **settings: Any) -> Trainers:
        started.append(Trainers(gathering(weights, count), engines, **settings))
        return started[-1]

    yield trainers
    for each in started:
        each.close()


def weights_of(seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    return {f"p{index}": torch.randn(4 * index + 4, 60) for index in range(6)}


def check_landed(engines: Engines, weights: Weights) -> None:
    for workers in engines.workers:
        for worker in workers:
            parts = {name: whole.chunk(engines.size)[worker.index] for name, whole in weights.items()}
            check_same_bytes(worker.memory.tensors, parts)


def check_failed(results: list[Any], *failures: Failure) -> None:
    """Every rank must have raised the same `SyncError`, with these failures among others."""
    assert len({str(error) for error in results}) == 1, results
    for error in results:
        assert isinstance(error, SyncError), error
        assert error.failures == results[0].failures and {*failures} <= {*error.failures}
        assert all(str(failure) in str(error) for failure in failures), error


def failure(engine: int, phase: str) -> Failure:
    return Failure(text="it was told to fail", engine=engine, phase=phase)


def check_ok(results: list[Any]) -> None:
    for report in results:
        assert isinstance(report, SyncReport), report


def in_step(trainers: Trainers) -> bool:
    return len({source.gathers for source in trainers.sources}) == 1


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
    passes = {"none": 1, "checksum": 1, "full": 2}[verify] + (count > 1 and verify != "none")
    assert in_step(trainers) and trainers.sources[0].gathers == 3 * passes, (
        "replicas are compared in a pass of their own"
    )
    joins = [request for request in engines.seen if isinstance(request, JoinGroup)]
    lanes = [lane for request in joins for of_worker in request.assignments for lane in of_worker]
    assert {lane.sender for lane in lanes} == set(range(count)), "replicas share the work"


@pytest.mark.parametrize("verify", ["checksum", "full"])
def test_replicas_that_differ_are_found_before_anything_is_sent(start: Start, verify: str) -> None:
    engines, weights = Engines(2, 2), weights_of()
    replica = {name: tensor.clone() for name, tensor in weights.items()}
    trainers = start(engines, [weights, weights, replica], count=3)
    check_ok(trainers.sync({"version": 1, "verify": verify}))
    replica["p3"][7, 5] = -replica["p3"][7, 5]
    received = sum(isinstance(request, Receive) for request in engines.seen)
    with within(SOON_S):
        results = trainers.sync({"version": 2, "verify": verify})
    text = (
        "trainer ranks hold different values of the same weights: p3 [0:16, 0:60] of [16, 60] (ranks 0 and 2). "
        "Load or broadcast the same weights on all of them"
    )
    check_failed(results, Failure(text=text, phase="verify"))
    assert sum(isinstance(request, Receive) for request in engines.seen) == received
    replica["p3"].copy_(weights["p3"])
    check_ok(trainers.sync({"version": 3, "verify": verify}))
    check_landed(engines, weights)


def test_a_rank_that_cannot_read_its_replicas_fails_all(start: Start) -> None:
    trainers = start(Engines(1, 1), weights_of())

    def fail_to_gather(order: object) -> Any:
        raise MemoryError("no memory")

    trainers.sources[1].gather = fail_to_gather
    with within(SOON_S):
        results = trainers.sync({"version": 1, "verify": "checksum"})
    check_failed(results)
    assert results[0].phase == "verify" and "trainer rank 1: no memory" in str(results[0])


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
        check_failed(trainers.sync({"version": 2, "verify": verify}), failure(1, "receive"))
    assert in_step(trainers) and engines.versions == {0: 1, 1: 1}
    assert sum(isinstance(request, AbortSync) for request in engines.seen) == 2
    engines.fault = lambda *_: None
    weights["p0"].zero_()
    check_ok(trainers.sync({"version": 3}))
    check_landed(engines, weights)


@pytest.mark.parametrize("broken", [0, 1])
def test_an_engine_that_cannot_commit_fails_all_ranks_and_none_is_finalized(start: Start, broken: int) -> None:
    engines = Engines(2, 1)
    trainers = start(engines, weights_of())
    check_ok(trainers.sync({"version": 1}))
    engines.fault = lambda engine, worker, request: fail(isinstance(request, Commit) and engine == broken)
    with within(SOON_S):
        check_failed(trainers.sync({"version": 2}), failure(broken, "commit"))
    assert sum(isinstance(request, Finalize) for request in engines.seen) == 2, "those of version 1"
    assert sum(isinstance(request, AbortSync) for request in engines.seen) == 2
    engines.fault = lambda *_: None
    check_ok(trainers.sync({"version": 2}))
    assert engines.versions == {0: 2, 1: 2}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_worker_that_cannot_join_fails_all_ranks_at_once(start: Start, broken: int) -> None:
    engines = Engines(2, 2)
    engines.fault = lambda engine, worker, request: fail(
        isinstance(request, JoinGroup) and (engine, worker) == (1, broken)
    )
    trainers = start(engines, weights_of())
    with within(SOON_S):
        check_failed(trainers.sync({"version": 1}), failure(1, "join"))
    engines.fault = lambda *_: None
    check_ok(trainers.sync({"version": 1}))


def test_a_worker_that_never_joins_is_named_on_all_ranks_in_time(start: Start) -> None:
    engines = Engines(2, 2)
    engines.fault = lambda engine, worker, request: delay(isinstance(request, JoinGroup) and (engine, worker) == (1, 1))
    trainers = start(engines, weights_of(), sync_timeout_s=12.0)
    with within(13.0):
        results = trainers.sync({"version": 1})
    for error in results:
        assert isinstance(error, SyncError) and error.failures == results[0].failures
        assert ("join", 1) in [(each.phase, each.engine) for each in error.failures] and "engine 1: " in str(error)


def test_a_rank_that_is_late_for_the_lanes_is_a_failure_of_the_sync() -> None:
    class Refusing:
        def request_each(self, request: Prepare, *, deadline: Deadline) -> None:
            raise EngineError("it was told to fail")

    client: Any = Refusing()
    lanes = Lanes(
        client,
        Agreement(dist.HashStore(), rank=0, size=2),
        WeightSource(weights_of()),
        config=RolloutConfig(model="", dtype="float32", device="cpu", trainers=2),
        rank=0,
        host="127.0.0.1",
        ranks=(),
    )
    with pytest.raises(SyncError) as caught:
        lanes.open("sync", join_deadline=Deadline(0.1), deadline=Deadline(0.1))
    assert caught.value.failures == (Failure(text="trainer rank 1 did not come within 0.1 s", phase="agree"),)


def test_plans_may_be_larger_than_the_store_takes_at_once(start: Start) -> None:
    engines, weights = Engines(1, 2, ballast=5 << 20), weights_of()
    check_ok(start(engines, weights).sync({"version": 1}))
    check_landed(engines, weights)


def test_ranks_that_ask_for_different_verification_all_raise(start: Start) -> None:
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


def test_failed_and_repeated_syncs_leave_nothing_behind(start: Start) -> None:
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
