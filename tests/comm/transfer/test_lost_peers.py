"""A failure anywhere ends the sync everywhere, in time; the trainer always gathers all weights."""

from dataclasses import replace

import pytest
import torch
from moves import whole_moves
from ranks import LONG_S, Ranks, Tapped, WatchedSource, receive, send
from sides import Sides, check_same_bytes, every_kind, large_source, within

from rollcast.comm import Deadline, WeightSource
from rollcast.comm.transport.gloo import GlooWork

SHORT_S = 4.0


def test_weights_that_changed_are_refused_before_the_first_byte() -> None:
    weights = every_kind(seed=0)
    sides = Sides(WeightSource(weights))
    weights["split"] = torch.zeros(4999)
    message = r"changed .* expected split \[5000\] float32, got split \[4999\]"
    with Ranks([]) as ranks:
        tap = Tapped(ranks.senders[0])
        with pytest.raises(ValueError, match=message):
            send(sides.broadcaster, {0: tap})
    assert tap.broadcasts == 0


@pytest.mark.parametrize("buckets", [0, 1], ids=["before the first bucket", "after one"])
def test_a_receiver_that_leaves_fails_the_sender_at_once(buckets: int) -> None:
    sides = Sides(large_source())
    with Ranks([0]) as ranks, within(5.0):
        sent = ranks.start(send, sides.broadcaster, ranks.senders)
        for bucket in sides.plan.lanes[0].buckets[:buckets]:
            tensors, deadline = [torch.empty(m.nbytes, dtype=torch.uint8) for m in bucket.messages], Deadline(LONG_S)
            ranks.workers[0].broadcast(tensors, root=0, deadline=deadline).wait(deadline)
        ranks.workers[0].close()
        assert isinstance(sent.exception(LONG_S), RuntimeError)


@pytest.mark.parametrize("count", [1, 800], ids=["one bucket", "many"])
def test_a_receiver_that_never_receives_fails_the_sender_within_its_deadline(count: int) -> None:
    sides = Sides(large_source(count), workers=2)
    with Ranks(range(2)) as ranks, within(SHORT_S + 1.0):
        received = ranks.start(receive, sides.receivers[0], ranks.workers[0], SHORT_S)
        with pytest.raises((RuntimeError, TimeoutError)):
            send(sides.broadcaster, ranks.senders, SHORT_S)
        received.exception(LONG_S)


@pytest.mark.parametrize("keep", [False, True], ids=["error dropped", "error referenced"])
def test_a_sender_that_failed_and_left_fails_its_receivers_at_once(keep: bool) -> None:
    sides = Sides(large_source(), workers=2)
    with Ranks(range(2)) as ranks, within(SHORT_S / 2):
        ranks.workers[0].close()
        sent = ranks.start(send, sides.broadcaster, ranks.senders)
        assert sent.exception(LONG_S)
        if not keep:
            del sent
        ranks.senders[0].close()
        with pytest.raises(RuntimeError):
            receive(sides.receivers[1], ranks.workers[1], SHORT_S)
    assert sides.memories[1].events == ["begin", "abort"]


@pytest.mark.parametrize("refuse", ["begin", "finish 0", "commit"])
def test_a_landing_that_raises_fails_the_sender_at_once(refuse: str) -> None:
    source = large_source()
    moves = [replace(move, stage=0 if move.param == 0 else None) for move in whole_moves(source.manifest)]
    sides = Sides(source, moves=moves, refuse=refuse)
    with Ranks([0]) as ranks, within(SHORT_S / 2):
        sent = ranks.start(send, sides.broadcaster, ranks.senders, SHORT_S)
        with pytest.raises(RuntimeError, match=f"refused to {refuse}"):
            receive(sides.receivers[0], ranks.workers[0])
        ranks.workers[0].close()
        assert (sent.exception(LONG_S) is None) is (refuse == "commit")
    (memory,) = sides.memories
    assert "commit" not in memory.events
    assert memory.events[-1:] == ["abort"]
    # The broadcasts of the failed sync are dropped.
    memory.refuse = ""
    with Ranks([0]) as repaired:
        sides.sync(repaired)
    assert memory.events == ["begin", "finish 0", "commit"]


def test_after_a_failure_all_weights_were_gathered_and_a_new_group_works() -> None:
    source = WatchedSource(every_kind(seed=0))
    sides = Sides(source)
    with Ranks([0]) as broken:
        broken.workers[0].close()
        with pytest.raises(RuntimeError):
            send(sides.broadcaster, broken.senders)
        with pytest.raises(RuntimeError, match="closed"):
            receive(sides.receivers[0], broken.workers[0])
    assert source.gathered == list(sides.plan.order)
    assert sides.memories[0].events == ["begin", "abort"]
    with Ranks([0]) as repaired:
        sides.sync(repaired)
    check_same_bytes(sides.memories[0].tensors, every_kind(seed=0))


class Part:
    """One of gloo's broadcasts: completed or not, failed or not."""

    def __init__(self, problem: str = "", *, completed: bool = True) -> None:
        self.problem, self.completed = problem, completed

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        if self.problem:
            raise RuntimeError(self.problem)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_grouped_broadcast_completes_with_its_last_part_and_fails_if_any_part_fails(place: int) -> None:
    late = [Part(completed=index != place) for index in range(3)]
    with pytest.raises(TimeoutError):
        GlooWork(late).wait(Deadline(0.05))
    lost = [Part("peer lost" if index == place else "") for index in range(3)]
    with pytest.raises(RuntimeError, match="peer lost"):
        GlooWork(lost).wait(Deadline(LONG_S))
