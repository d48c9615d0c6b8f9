"""Syncs of what several ranks hold: who sends what, and what is wrong on one rank is an error on all."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from engines import Engines, Trainers
from landed import check_landed, check_ok
from ranks import LONG_S
from shard_ranks import State, full_weights, refresh, shard_rows
from sides import within
from torch import distributed as dist

from rollcast.comm import Holding, host_store
from rollcast.comm.agreement import Agreement
from rollcast.rollout import RolloutConfig
from rollcast.rollout.job.job import Job
from rollcast.rollout.job.world import World
from rollcast.rollout.protocol.messages import JoinGroup, Receive

pytestmark = pytest.mark.timeout(120)
SOON_S = 20.0
Start = Callable[..., Trainers]


def check_refused(results: list[Any], *parts: str) -> None:
    """Every rank must have raised the same `ValueError`, which has these parts."""
    assert len({str(error) for error in results}) == 1, results
    for error in results:
        assert isinstance(error, ValueError), error
        assert all(part in str(error) for part in parts), error


@pytest.mark.parametrize("verify", ["none", "full"])
@pytest.mark.parametrize(("count", "size"), [(2, 1), (3, 2), (4, 2)])
def test_every_rank_sends_its_rows(start_shards: Start, count: int, size: int, verify: str) -> None:
    engines, weights = Engines(1, size), full_weights()
    states = shard_rows(weights, count)
    trainers = start_shards(engines, states)
    for version in (1, 2):
        weights = full_weights(seed=version)
        refresh(states, weights)
        check_ok(trainers.sync({"version": version, "verify": verify}))
        check_landed(engines, weights)
    joins = [request for request in engines.seen if isinstance(request, JoinGroup)]
    assert {lane.sender for each in joins for of_worker in each.assignments for lane in of_worker} == {*range(count)}


def hole(state: State) -> None:
    held = state["p3"]
    state["p3"] = Holding(held.tensor[1:], held.shape, (held.start[0] + 1, 0))


def nothing(state: State) -> None:
    del state["p3"]


def other_shape(state: State) -> None:
    state["p3"] = Holding(state["p3"].tensor, (17, 60), state["p3"].start)


def other_dtype(state: State) -> None:
    held = state["p3"]
    state["p3"] = Holding(held.tensor.bfloat16(), held.shape, held.start)


def other_view(state: State) -> None:
    held = state["p3"]
    state["p3"] = Holding(held.tensor.flatten(), held.shape, (held.start[0] * 60,), (16 * 60,))


def other_place(state: State) -> None:
    held = state["p3"]
    state["p3"] = Holding(held.tensor, held.shape, (held.start[0] - 1, 0))


# What rank 1 of three does; what is said of it at the first sync, and what if it comes later.
MISTAKES: dict[str, tuple[Callable[[State], None], str, str]] = {
    "a hole": (
        hole,
        "no trainer rank holds [6:7, 0:60] of [16, 60] of parameter p3 [16, 60] float32",
        "got [7:12, 0:60]",
    ),
    "nothing": (nothing, "no trainer rank holds [6:12, 0:60] of [16, 60] of parameter p3", "p3"),
    "another shape": (other_shape, "trainer ranks 0 and 1 disagree about parameter p3", "got p3 [17, 60] float32"),
    "another dtype": (other_dtype, "trainer ranks 0 and 1 disagree about parameter p3", "got p3 [16, 60] bfloat16"),
    "another view": (
        other_view,
        "hold of parameter p3 [16, 60] float32 with different shapes",
        "got [360:720] of [960]",
    ),
    "another place": (
        other_place,
        "no trainer rank holds [11:12, 0:60] of [16, 60] of parameter p3",
        "got [5:11, 0:60]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_is_an_error_of_all_before_the_first_byte(start_shards: Start, mistake: str) -> None:
    make, message, _ = MISTAKES[mistake]
    engines, states = Engines(1, 2), shard_rows(full_weights(), 3)
    make(states[1])
    with within(SOON_S):
        check_refused(start_shards(engines, states).sync({"version": 1}), message)
    assert engines.seen == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_rank_that_holds_something_else_than_it_stated_is_named_on_all(start_shards: Start, mistake: str) -> None:
    make, _, message = MISTAKES[mistake]
    engines, weights = Engines(1, 2), full_weights()
    states = shard_rows(weights, 3)
    trainers = start_shards(engines, states)
    check_ok(trainers.sync({"version": 1}))
    stated = dict(states[1])
    make(states[1])
    with within(SOON_S):
        check_refused(trainers.sync({"version": 2}), "trainer ranks 0 and 1 disagree", "weights that changed", message)
    assert sum(isinstance(request, Receive) for request in engines.seen) == 1 and engines.versions == {0: 1}
    # As it was stated again.
    states[1].clear()
    states[1].update(stated)
    check_ok(trainers.sync({"version": 2}))
    check_landed(engines, weights)


def test_memory_that_was_replaced_below_a_holding_is_named_on_all(start_shards: Start) -> None:
    states = shard_rows(full_weights(), 3)
    held = states[1]["p3"]
    owner = torch.nn.Parameter(held.tensor.clone())
    states[1]["p3"] = Holding(owner[:], held.shape, held.start)
    trainers = start_shards(Engines(1, 1), states)
    check_ok(trainers.sync({"version": 1}))
    owner.data = torch.zeros_like(owner)
    results = trainers.sync({"version": 2})
    check_refused(results, "ranks 0 and 1 disagree", "p3: its holding is a view of memory that was replaced")


@pytest.mark.parametrize("broken", [0, 1])
def test_weights_that_one_rank_cannot_send_are_an_error_of_all_ranks(broken: int) -> None:
    """`job.broadcaster` raises on that rank; on the others the first sync does, at once. Then all can try again."""
    engines, weights = Engines(1, 1), full_weights()
    states: list[Any] = shard_rows(weights, 2)
    bad = {**states[broken], "p3": "text"}
    with jobs_of(engines, ranks=2) as jobs:
        broadcasters: list[Any] = [None, None]
        with pytest.raises(ValueError, match="p3 is not a tensor but str"):
            jobs[broken].broadcaster(bad)
        broadcasters[1 - broken] = jobs[1 - broken].broadcaster(states[1 - broken])
        message = f"trainer rank {broken}: these weights cannot be sent: p3 is not a tensor but str"
        with within(SOON_S), pytest.raises(ValueError, match=message):
            broadcasters[1 - broken].sync(version=1)
        broadcasters = [job.broadcaster(state) for job, state in zip(jobs, states, strict=True)]
        with ThreadPoolExecutor(2) as threads:
            check_ok(list(threads.map(lambda each: each.sync(version=1), broadcasters)))
        check_landed(engines, weights)


@contextmanager
def jobs_of(engines: Engines, *, ranks: int) -> Iterator[list[Job]]:
    """The jobs of trainer ranks, as `join` yields them."""
    store, address = host_store("127.0.0.1", timeout_s=LONG_S)
    host, port = address.split(":")
    config = RolloutConfig(model="", dtype="float32", device="cpu", trainers=ranks)
    pool: Any = engines
    with ExitStack() as stack:
        yield [
            Job(
                config=config,
                world=World(
                    rank=rank,
                    world_size=ranks + 1,
                    local_rank=rank,
                    local_world_size=ranks + 1,
                    trainers=ranks,
                    tensor_parallel_size=1,
                ),
                ranks=[],
                _pool=pool,
                _agreement=Agreement(dist.TCPStore(host, int(port), is_master=False), rank=rank, size=ranks),
                _stack=stack,
            )
            for rank in range(ranks)
        ]
    del store
