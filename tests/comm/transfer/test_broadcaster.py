"""Whole parameters over real gloo groups: workers get the bytes of torch's own casts, however slow a side is."""

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from moves import whole_moves
from ranks import CPU, LONG_S, Ranks, Tapped, WatchedSource, Weights, all_results, receive, receiver_of, send
from sides import Sides, cast, check_same_bytes, every_kind, full_tensors, large_source, memory_of, widened
from torch import distributed as dist

from rollcast.comm import Deadline, Holders, WeightBroadcaster, WeightReceiver, WeightSource, build_transfer
from rollcast.comm.device.storage import aligned
from rollcast.comm.plan.buckets import LARGE_BYTES

BUCKET_BYTES = 1024


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_received_bytes_are_torchs_own_cast(dtype: torch.dtype | None) -> None:
    sides = Sides(WeightSource(every_kind(seed=0), dtype=dtype), workers=3)
    with Ranks(range(3)) as ranks:
        assert not dist.is_initialized()
        sides.sync(ranks)
    for memory in sides.memories:
        check_same_bytes(memory.tensors, cast(every_kind(seed=0), dtype))


def test_ten_syncs_bring_new_values_in_the_same_buffers() -> None:
    weights = every_kind(seed=0)
    source = WeightSource(weights, dtype=torch.bfloat16)
    sides = Sides(source, workers=2, moves=widened(source.manifest))
    buffers: set[tuple[int, ...]] = set()
    with Ranks(range(2)) as ranks:
        for step in range(10):
            for name, value in every_kind(seed=step).items():
                weights[name].copy_(value)
            sides.sync(ranks)
            for memory in sides.memories:
                check_same_bytes(memory.tensors, doubles(cast(every_kind(seed=step), torch.bfloat16)))
            buffers.add(tuple(buffer_addresses(sides.broadcaster, *sides.receivers.values())))
    assert len(buffers) == 1
    assert len(set(*buffers)) == 2 * 3


def test_phases_are_timed() -> None:
    for checksums, extra in ((False, set()), (True, {"verify"})):
        sides = Sides(large_source(3))
        with Ranks([0]) as ranks:
            sent = ranks.start(send, sides.broadcaster, ranks.senders, checksums=checksums)
            received = receive(sides.receivers[0], ranks.workers[0], checksums=checksums)
            assert set(sent.result(LONG_S).phases_s) == {"gather", "pack", "wire"} | extra
            assert set(received.phases_s) == {"wire", "apply"} | extra


@pytest.mark.parametrize("rank", [1, 0], ids=["gathers only", "group of one"])
def test_a_trainer_without_peers_gathers_every_weight(rank: int) -> None:
    source = WatchedSource(every_kind(seed=0))
    plan = Sides(source, workers=0).plan
    with Ranks([]) as ranks:
        groups = {} if rank else ranks.senders
        send(WeightBroadcaster(source, plan, rank=rank, device=CPU), groups)
    assert (
        source.gathered
        == list(plan.order)
        == [index for index, name in enumerate(every_kind(seed=0)) if name != "empty"]
    )


@pytest.mark.parametrize("slow", ["sender", "receiver"])
def test_a_slow_side_still_gets_its_own_bytes(slow: str) -> None:
    """Buffers are used in turn: neither side may overwrite what the other, or itself, still needs."""
    weights = {f"p{index}": torch.full((250,), float(index)).double() for index in range(24)}
    source = (
        SlowSource(weights, dtype=torch.float32) if slow == "sender" else WeightSource(weights, dtype=torch.float32)
    )
    moves = [replace(move, stage=move.param) for move in whole_moves(source.manifest)]
    sides = Sides(source, moves=moves)
    if slow == "receiver":
        finish = sides.memories[0].finish
        sides.memories[0].finish = lambda stage: (time.sleep(0.02), finish(stage))[1]
    with Ranks([0]) as ranks:
        sides.sync(ranks)
    for index in range(24):
        assert sides.memories[0].processed[index][f"p{index}"].unique().tolist() == [index]


def test_a_late_receiver_gets_everything() -> None:
    source = large_source(20)
    sides = Sides(source)
    with Ranks([0]) as ranks:
        sent = ranks.start(send, sides.broadcaster, ranks.senders)
        time.sleep(0.5)
        receive(sides.receivers[0], ranks.workers[0])
        sent.result(LONG_S)
    check_same_bytes(sides.memories[0].tensors, {spec.name: tensor for spec, tensor in full_tensors(source)})


def test_a_bucket_leaves_as_soon_as_it_is_full() -> None:
    """Workers of two lanes may process a stage together: neither may wait for what comes later to the other."""
    source = WeightSource({f"p{index}": torch.full((250,), float(index)) for index in range(22)})
    moves = whole_moves(source.manifest)
    both, first, second = replace(moves[0], stage=0), moves[1:21], moves[21:]
    landings = {"a": (both, *first), "b": (both, *second)}
    plan = build_transfer(Holders.replicated(source.manifest, 1), landings, ["a", "b"], bucket_bytes=BUCKET_BYTES)
    meeting = threading.Barrier(2, timeout=5.0)
    memories = [memory_of(source.manifest, moves) for moves in landings.values()]
    for memory in memories:
        memory.finish = lambda stage, finish=memory.finish: (meeting.wait(), finish(stage))[1]
    receivers = {w: receiver_of(plan.lanes_of(w), memory) for w, memory in enumerate(memories)}
    with Ranks([0], [1]) as ranks:
        ranks.sync([WeightBroadcaster(source, plan, device=CPU)], receivers)


@pytest.mark.parametrize("bucket_bytes", [LARGE_BYTES, 3 * LARGE_BYTES, 1 << 26])
def test_large_contiguous_pieces_are_sent_and_received_without_a_copy(bucket_bytes: int) -> None:
    weights = {
        "big": torch.randn(LARGE_BYTES),
        "one": torch.randn(LARGE_BYTES // 4),
        "half": torch.randn(1 << 19).half(),
    }
    sides = Sides(WeightSource(weights), bucket_bytes=bucket_bytes)
    with Ranks([0]) as ranks:
        out, into = Tapped(ranks.senders[0]), Tapped(ranks.workers[0])
        sent = ranks.start(send, sides.broadcaster, {0: out})
        all_results(sent, ranks.start(receive, sides.receivers[0], into))
    (memory,) = sides.memories
    check_same_bytes(memory.tensors, weights)
    assert out.extents == extents(weights, bucket_bytes)
    assert into.extents == extents(memory.tensors, bucket_bytes)
    assert not sides.broadcaster._lanes[0].ring._buffers
    assert not sides.receivers[0].lanes[0].ring._buffers


def extents(weights: Weights, bucket_bytes: int) -> list[tuple[int, int]]:
    """Return (address, bytes) of every tensor, in parts of at most a bucket."""
    return [
        (tensor.data_ptr() + start, min(bucket_bytes, tensor.nbytes - start))
        for tensor in weights.values()
        for start in range(0, tensor.nbytes, bucket_bytes)
    ]


def test_masters_of_another_dtype_are_packed_and_received_in_place() -> None:
    weights = {"big": torch.randn(LARGE_BYTES), "small": torch.randn(100)}
    sides = Sides(WeightSource(weights, dtype=torch.bfloat16), bucket_bytes=1 << 26)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
    check_same_bytes(sides.memories[0].tensors, cast(weights, torch.bfloat16))
    assert len(sides.broadcaster._lanes[0].ring._buffers) == 2
    assert not sides.receivers[0].lanes[0].ring._buffers


def test_receivers_allocate_buffers_only_for_messages_that_are_not_received_in_place() -> None:
    weights = {"a": torch.randn(100).half(), "b": torch.randn(200).half(), "c": torch.randn(300).half()}
    source = WeightSource(weights)
    first, *others = whole_moves(source.manifest)
    sides = Sides(source, moves=(first, widened(source.manifest)[1], *others[1:]), bucket_bytes=1 << 20)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
    assert [buffer.nbytes for buffer in sides.receivers[0].lanes[0].ring._buffers] == [aligned(400)] * 2
    check_same_bytes(sides.memories[0].tensors, weights | {"b": weights["b"].double()})


def test_large_strided_weights_are_copied_once_into_the_buffers() -> None:
    weights = {f"p{index}": torch.randn(700, 800).t() for index in range(6)}
    sides = Sides(WeightSource(weights), bucket_bytes=1 << 22)
    with Ranks([0]) as ranks:
        sides.sync(ranks)
    check_same_bytes(sides.memories[0].tensors, weights)
    assert len(sides.broadcaster._lanes[0].ring._buffers) == 2
    send(sides.broadcaster, {0: GroupOfOne()})


def test_weights_on_another_device_are_packed() -> None:
    """A transport of one device cannot send from another."""
    source, group = large_source(3), GroupOfOne()
    send(WeightBroadcaster(source, Sides(source).plan, device=torch.device("meta")), {0: group})
    assert group.devices == {"meta"}


class GroupOfOne:
    """A group without peers whose broadcasts are under way until somebody waits for them."""

    rank, size, low_priority = 0, 1, False

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def broadcast(self, tensors: Sequence[torch.Tensor], *, root: int, deadline: Deadline) -> "UnfinishedWork":
        self.devices |= {tensor.device.type for tensor in tensors}
        return UnfinishedWork(tensors)

    def ready(self) -> bool:
        return True

    def unmap(self) -> None: ...

    def close(self) -> None:
        pass


class UnfinishedWork:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = [weakref.ref(tensor) for tensor in tensors]

    def wait(self, deadline: Deadline) -> None:
        assert all(tensor() is not None for tensor in self.tensors)


class SlowSource(WeightSource):
    """A source that takes 10 ms to gather a parameter."""

    def gather(self, order: Sequence[int]) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        for item in super().gather(order):
            time.sleep(0.01)
            yield item


def doubles(weights: Weights) -> Weights:
    return {name: tensor.double() if tensor.numel() else tensor for name, tensor in weights.items()}


def buffer_addresses(broadcaster: WeightBroadcaster, *receivers: WeightReceiver) -> Iterator[int]:
    for ring in (broadcaster._lanes[0].ring, *(receiver.lanes[0].ring for receiver in receivers)):
        assert len(ring._buffers) == 2
        yield from (buffer.data_ptr() for buffer in ring._buffers)
