"""A broadcast that fails because of one tensor names the message, on both sides and in any bucket."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ranks import LONG_S, Ranks, receive, send
from sides import Sides, large_source

from rollcast.comm import Deadline
from rollcast.comm.transfer.bucket_work import broadcast_bucket
from rollcast.comm.transport import TensorError

MOVED = "is in other memory than at the last sync"


class FailingGroup:
    """A group whose broadcast of one number fails because of its last tensor: at the start, or in the wait."""

    low_priority = False

    def __init__(self, group: Any = None, *, fails: int, waiting: bool) -> None:
        self._group, self._fails, self._waiting = group, fails, waiting
        self._broadcasts = 0

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> Any:
        self._broadcasts += 1
        if self._broadcasts <= self._fails:
            return self._group.broadcast(tensors, root=root, deadline=deadline)
        self._error = TensorError(len(tensors) - 1, MOVED)
        if self._waiting:
            return self
        raise self._error

    def wait(self, deadline: Deadline) -> None:
        raise self._error


@pytest.mark.parametrize("waiting", [False, True], ids=["at the start", "in the wait"])
def test_messages_are_numbered_over_all_buckets(waiting: bool) -> None:
    lane = Sides(large_source(11)).plan.lanes[0]
    assert len(lane.buckets) > 2
    first = 0
    for number, bucket in enumerate(lane.buckets):
        group: Any = FailingGroup(fails=0, waiting=waiting)
        tensors = [torch.empty(message.nbytes, dtype=torch.uint8) for message in bucket.messages]
        with pytest.raises(RuntimeError) as caught:
            broadcast_bucket(group, lane, number, tensors, deadline=Deadline(1.0)).wait(Deadline(1.0))
        first += len(bucket.messages)
        assert str(caught.value) == f"message {first - 1} of lane 0 ({bucket.messages[-1]}): {MOVED}"


@pytest.mark.parametrize("waiting", [False, True], ids=["at the start", "in the wait"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_sender_and_receiver_name_the_message(side: str, waiting: bool) -> None:
    sides = Sides(large_source(11))
    lane = sides.plan.lanes[0]
    last = len(lane.buckets[0].messages) + len(lane.buckets[1].messages) - 1
    with Ranks([0]) as ranks:
        groups: dict[str, Any] = {"sender": ranks.senders[0], "receiver": ranks.workers[0]}
        groups[side] = FailingGroup(groups[side], fails=1, waiting=waiting)
        sending = ranks.start(send, sides.broadcaster, {0: groups["sender"]}, timeout_s=5.0)
        receiving = ranks.start(receive, sides.receivers[0], groups["receiver"], timeout_s=5.0)
        with pytest.raises(RuntimeError) as caught:
            (sending if side == "sender" else receiving).result(LONG_S)
        assert str(caught.value) == f"message {last} of lane 0 ({lane.messages[last]}): {MOVED}"
        for group in (*ranks.senders.values(), *ranks.workers.values()):
            group.close()
