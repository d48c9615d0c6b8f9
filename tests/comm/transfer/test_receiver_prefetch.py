"""The first buckets are received beside live parameters that are still read, as far as memory and the sender allow."""

import time

import pytest
import torch
from moves import whole_moves
from ranks import LONG_S, Ranks, Tapped, receive, send
from sides import BUCKET_BYTES, Sides, check_same_bytes, every_kind, widened

from rollcast.comm import Deadline, WeightSource


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize(
    "spare_bytes, wide, buckets", [(1 << 20, False, 4), (5 * BUCKET_BYTES // 2, False, 2), (1 << 20, True, 2)]
)
def test_the_first_buckets_are_received_while_live_parameters_are_read(
    checksums: bool, spare_bytes: int, wide: bool, buckets: int
) -> None:
    source = WeightSource(weights := every_kind(seed=3))
    first, *others = whole_moves(source.manifest)
    sides = Sides(source, moves=(widened(source.manifest)[0] if wide else first, *others))
    (memory,), receiver = sides.memories, sides.receivers[0]
    assert not receiver.prepare_prefetch(lambda device: 100)
    assert receiver.prepare_prefetch(lambda device: spare_bytes)
    with Ranks([0]) as ranks:
        for turn in range(3):
            before = {name: tensor.clone() for name, tensor in memory.tensors.items()}
            sent = ranks.start(send, sides.broadcaster, ranks.senders, checksums=checksums)
            if turn != 1:
                receiver.start_prefetch(ranks.lanes_of[0], deadline=Deadline(LONG_S))
                assert receiver.prefetch_count == buckets
                time.sleep(0.2)
                check_same_bytes(memory.tensors, before)
            receive(receiver, ranks.workers[0], checksums=checksums)
            sent.result(LONG_S)
            check_same_bytes(memory.tensors, weights | ({"float32": weights["float32"].double()} if wide else {}))
            weights["float32"].add_(1.0)


class Late(Tapped):
    """A group whose root has only some broadcasts ready."""

    def ready(self) -> bool:
        return self.broadcasts % 10 < 3


def test_no_more_buckets_are_prefetched_than_the_sender_has_ready() -> None:
    sides = Sides(WeightSource(weights := {f"p{index}": torch.randn(200) for index in range(10)}))
    (memory,), receiver = sides.memories, sides.receivers[0]
    assert len(sides.plan.lanes[0].buckets) == 10 and receiver.prepare_prefetch(lambda device: 1 << 20)
    with Ranks([0]) as ranks:
        late = Late(ranks.workers[0])
        for _ in range(2):
            weights["p0"].add_(1.0)
            sent = ranks.start(send, sides.broadcaster, ranks.senders)
            receiver.start_prefetch({0: late}, deadline=Deadline(LONG_S))
            assert receiver.prefetch_count == 3
            receive(receiver, late)
            sent.result(LONG_S)
            check_same_bytes(memory.tensors, weights)
