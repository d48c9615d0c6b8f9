"""The broadcast of one bucket of a lane, whose errors name the message (both sides)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rollcast.comm.deadline import Deadline
from rollcast.comm.plan.transfer import Lane
from rollcast.comm.transport import Group, TensorError, Work


def broadcast_bucket(
    group: Group, lane: Lane, number: int, tensors: Sequence[torch.Tensor], *, deadline: Deadline
) -> "BucketWork":
    """Start to broadcast the messages of bucket number `number`, from rank 0. Collective; see `Group.broadcast`."""
    with naming_message(lane, number):
        return BucketWork(group.broadcast(tensors, root=0, deadline=deadline), lane, number)


class BucketWork:
    """The broadcast of one bucket, under way."""

    def __init__(self, work: Work, lane: Lane, number: int) -> None:
        self._work = work
        self._lane = lane
        self._number = number

    def wait(self, deadline: Deadline) -> None:
        """See `Work.wait`."""
        with naming_message(self._lane, self._number):
            self._work.wait(deadline)


@contextmanager
def naming_message(lane: Lane, number: int) -> Iterator[None]:
    """Raise a `TensorError` from inside as a `RuntimeError` that names the message of bucket number `number`."""
    try:
        yield
    except TensorError as error:
        index = sum(len(bucket.messages) for bucket in lane.buckets[:number]) + error.index
        raise RuntimeError(f"message {index} of lane {lane.index} ({lane.messages[index]}): {error.text}") from None
