"""Weights over real gloo groups: every rank is a thread with its own group, and the bytes must be torch's own."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Self

import pytest
import torch
from torch import distributed as dist

from rollcast.comm import (
    Deadline,
    Group,
    ParamSpec,
    PhaseTimer,
    WeightBroadcaster,
    WeightReceiver,
    WeightSource,
    build_plan,
    host_store,
    join_group,
)

CPU = torch.device("cpu")
BUCKET_BYTES, LONG_S, SHORT_S = 1024, 60.0, 4.0
Weights = dict[str, torch.Tensor]


class Landed:
    """A `Landing` that keeps a copy of what it is given, or refuses it."""

    def __init__(self, receiver: WeightReceiver, *, refuse: bool) -> None:
        self.plan = receiver.plan
        self.refuse = refuse
        self.tensors: Weights = {}
        self.begun = self.committed = False

    def begin(self) -> None:
        self.begun = True

    def land(self, param: int, tensor: torch.Tensor) -> None:
        assert self.begun and not self.refuse
        spec = self.plan.manifest.specs[param]
        assert not self.committed
        assert spec.name not in self.tensors
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        self.tensors[spec.name] = tensor.clone()

    def commit(self) -> None:
        assert len(self.tensors) == len(self.plan.manifest.specs)
        self.committed = True


class CountingSource(WeightSource):
    """Counts the tensors that were taken from it."""

    taken = 0

    def __iter__(self) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
        for self.taken, item in enumerate(super().__iter__(), start=1):
            yield item


class Ranks:
    """The ranks of one weight group."""

    def __init__(self, size: int) -> None:
        self.start = ThreadPoolExecutor(2 * size).submit
        store, address = host_store("127.0.0.1", timeout_s=LONG_S)
        join = partial(join_group, "gloo", size=size, deadline=Deadline(LONG_S))
        joining = [self.start(join, store if rank == 0 else address, rank=rank) for rank in range(size)]
        self.groups: list[Group] = [future.result(LONG_S) for future in joining]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.groups:
            group.close()

    def sync(self, broadcaster: WeightBroadcaster, receivers: list[WeightReceiver]) -> list[Weights]:
        """Send from rank 0; what landed on each of the others."""
        sent = self.start(send, broadcaster, self.groups[0])
        received = [self.start(receive, *pair) for pair in zip(receivers, self.groups[1:], strict=True)]
        assert set(sent.result(LONG_S).phases_s) == {"gather", "pack", "wire"}
        return [future.result(LONG_S) for future in received]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_received_bytes_are_torchs_own_cast(dtype: torch.dtype | None) -> None:
    broadcaster, receivers = sides(WeightSource(every_kind(seed=0), dtype=dtype), receivers=3)
    with Ranks(4) as job:
        assert not dist.is_initialized()
        for landed in job.sync(broadcaster, receivers):
            assert_same_bytes(landed, cast(every_kind(seed=0), dtype))


def test_ten_syncs_bring_new_values_in_the_same_buffers() -> None:
    weights = every_kind(seed=0)
    broadcaster, receivers = sides(WeightSource(weights, dtype=torch.bfloat16), receivers=2)
    addresses: set[tuple[int, ...]] = set()
    with Ranks(3) as job:
        for step in range(10):
            for name, value in every_kind(seed=step).items():
                weights[name].copy_(value)
            for landed in job.sync(broadcaster, receivers):
                assert_same_bytes(landed, cast(every_kind(seed=step), torch.bfloat16))
            addresses.add(tuple(buffer_addresses(broadcaster, *receivers)))
    assert len(addresses) == 1


@pytest.mark.parametrize("sends", [False, True], ids=["gathers only", "group of one"])
def test_a_trainer_without_peers_walks_the_source(sends: bool) -> None:
    source = CountingSource(every_kind(seed=0))
    with Ranks(1) as job:
        send(sides(source)[0], job.groups[0] if sends else None)
    assert source.taken == len(source.manifest.specs)


@pytest.mark.parametrize("buckets", [0, 1], ids=["at once", "half way"])
def test_a_receiver_that_leaves_fails_the_sender_at_once(buckets: int) -> None:
    broadcaster, (receiver,) = sides(large_source())
    with Ranks(2) as job, within(5.0):
        sent = job.start(send, broadcaster, job.groups[0])
        for bucket in receiver.plan.buckets[:buckets]:
            buffer, deadline = torch.empty(bucket.nbytes, dtype=torch.uint8), Deadline(LONG_S)
            job.groups[1].broadcast(buffer, root=0, deadline=deadline).wait(deadline)
        job.groups[1].close()
        assert isinstance(sent.exception(LONG_S), RuntimeError)


@pytest.mark.parametrize("count", [1, 800], ids=["one bucket", "many"])
def test_a_receiver_that_never_answers_fails_the_sender_within_its_deadline(count: int) -> None:
    broadcaster, (receiver,) = sides(large_source(count))
    with Ranks(3) as job, within(SHORT_S + 1.0):
        received = job.start(receive, receiver, job.groups[1], SHORT_S)
        with pytest.raises((RuntimeError, TimeoutError)):
            send(broadcaster, job.groups[0], SHORT_S)
        received.exception(LONG_S)


@pytest.mark.parametrize("keep", [False, True], ids=["error forgotten", "error kept"])
def test_a_sender_that_failed_and_left_fails_its_receivers_at_once(keep: bool) -> None:
    broadcaster, (receiver,) = sides(large_source())
    with Ranks(3) as job, within(SHORT_S / 2):
        job.groups[1].close()
        sent = job.start(send, broadcaster, job.groups[0])
        assert sent.exception(LONG_S)
        if not keep:
            del sent
        job.groups[0].close()
        with pytest.raises(RuntimeError):
            receive(receiver, job.groups[2], SHORT_S)


def test_a_landing_that_raises_fails_the_sender_at_once() -> None:
    broadcaster, (receiver,) = sides(large_source())
    with Ranks(2) as job, within(SHORT_S / 2):
        sent = job.start(send, broadcaster, job.groups[0], SHORT_S)
        with suppress(AssertionError):
            receive(receiver, job.groups[1], refuse=True)
        job.groups[1].close()
        assert sent.exception(LONG_S)


def test_after_a_failure_the_source_was_walked_and_a_new_group_works() -> None:
    source = CountingSource(every_kind(seed=0))
    broadcaster, receivers = sides(source)
    with Ranks(2) as broken:
        broken.groups[1].close()
        with pytest.raises(RuntimeError):
            send(broadcaster, broken.groups[0])
        with pytest.raises(RuntimeError, match="closed"):
            receive(receivers[0], broken.groups[1])
    assert source.taken == len(source.manifest.specs)
    with Ranks(2) as repaired:
        assert_same_bytes(repaired.sync(broadcaster, receivers)[0], every_kind(seed=0))


def every_kind(*, seed: int) -> Weights:
    """Contiguous, strided, split, scalar, zero-element; every sort of dtype."""
    torch.manual_seed(seed)
    return {
        "float32": torch.randn(17, 9),
        "float16": torch.randn(100).half(),
        "transposed": torch.randn(7, 21).t(),
        "strided": torch.randn(30, 4)[::3, 1:],
        "split": torch.randn(5000),
        "split strided": torch.randn(60, 50).t(),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 4),
        "fp8": torch.randn(33).to(torch.float8_e4m3fn),
        "int8": torch.randint(-128, 128, (3, 11), dtype=torch.int8),
        "int64": torch.randint(-(2**62), 2**62, (5,)),
        "bool": torch.rand(2000) < 0.5,
    }


def large_source(count: int = 800) -> WeightSource:
    return WeightSource({f"p{index}": torch.randn(250) for index in range(count)})


def sides(source: WeightSource, *, receivers: int = 1) -> tuple[WeightBroadcaster, list[WeightReceiver]]:
    plan = build_plan(source.manifest, bucket_bytes=BUCKET_BYTES)
    return WeightBroadcaster(source, plan, device=CPU), [WeightReceiver(plan, device=CPU) for _ in range(receivers)]


def cast(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """What must arrive: floating-point tensors in the wire dtype, the others as they are."""
    wide = {name for name, t in weights.items() if t.is_floating_point() and t.dtype.itemsize > 1}
    return {name: t.to(dtype) if dtype and name in wide else t for name, t in weights.items()}


def assert_same_bytes(got: Weights, expected: Weights) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert torch.equal(ours, theirs), name


@contextmanager
def within(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    yield
    assert time.monotonic() < end


def send(broadcaster: WeightBroadcaster, group: Group | None, timeout_s: float = LONG_S) -> PhaseTimer:
    timer = PhaseTimer()
    broadcaster.send(group, deadline=Deadline(timeout_s), timer=timer)
    return timer


def receive(receiver: WeightReceiver, group: Group, timeout_s: float = LONG_S, *, refuse: bool = False) -> Weights:
    landed, timer = Landed(receiver, refuse=refuse), PhaseTimer()
    receiver.receive(group, landed, deadline=Deadline(timeout_s), timer=timer)
    assert landed.committed
    assert not receiver._whole
    assert set(timer.phases_s) == {"wire", "apply"}
    return landed.tensors


def buffer_addresses(broadcaster: WeightBroadcaster, *receivers: WeightReceiver) -> Iterator[int]:
    for side in (broadcaster, *receivers):
        assert side._buffers is not None
        yield from (buffer.data_ptr() for buffer in side._buffers._buffers)
