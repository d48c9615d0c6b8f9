"""Random moves over real gloo groups leave in every worker what torch's own copies leave, and nothing else."""

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from moves import Key, Sink, random_sink, random_values, random_weights
from ranks import CPU, Memory, Ranks, Tapped, WatchedSource, all_results, receive, receiver_of, same_bytes, send

from rollcast.comm import Manifest, TransferPlan, WeightBroadcaster, build_transfer

BUCKET_BYTES = (256, 300, 1024, 4096, 65537, 1 << 22)
SEEDS = 40
# Workers 0 and 2 keep the same.
WORKERS, LANES = ("a", "b", "a"), ((0, 2), (1,))
ALL = set(product((False, True), repeat=3))
KINDS = ALL - {(False, False, True), (False, True, True), (True, False, True)}


class Job:
    """A random trainer and three workers."""

    def __init__(self, seed: int, *, senders: int) -> None:
        self.rng = rng = random.Random(seed)
        self.weights = random_weights(rng)
        dtype = rng.choice([None, torch.bfloat16, torch.float32])
        self.sources = [WatchedSource(self.weights, dtype=dtype) for _ in range(senders)]
        manifest = self.sources[0].manifest
        params = range(len(manifest.specs))
        some = rng.sample(params, rng.randint(1, len(params)))
        # The first keeps whatever the second does not.
        keeps = {"a": [p for p in params if p not in some or rng.random() < 0.5], "b": some}
        self.sinks = {name: random_sink(rng, manifest, params) for name, params in keeps.items()}
        self.plan = self._plan(manifest)
        self.broadcasters = [
            WeightBroadcaster(source, self.plan, rank=r, device=CPU) for r, source in enumerate(self.sources)
        ]
        self.memories = {worker: self.sinks[name].memory() for worker, name in enumerate(WORKERS)}
        self.receivers = {w: receiver_of(self.plan.lane_of(w), memory) for w, memory in self.memories.items()}

    def _plan(self, manifest: Manifest) -> TransferPlan:
        landings = {name: sink.moves() for name, sink in self.sinks.items()}
        bucket_bytes = self.rng.choice(BUCKET_BYTES)
        return build_transfer(manifest, landings, WORKERS, senders=len(self.sources), bucket_bytes=bucket_bytes)

    def change(self) -> None:
        """Give the trainer's weights new values."""
        for tensor in self.weights.values():
            tensor.copy_(random_values(self.rng, tensor.shape, tensor.dtype))

    def expected(self, worker: int) -> dict[Key, torch.Tensor]:
        return self.sinks[WORKERS[worker]].expected(list(self.weights.values()))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(*LANES) as ranks:
        yield ranks


@pytest.mark.parametrize("senders", [1, 2], ids=["one sender", "two senders"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_memory_is_what_direct_copies_leave(ranks: Ranks, seed: int, senders: int) -> None:
    job = Job(seed, senders=senders)
    assert [lane.workers for lane in job.plan.lanes] == list(LANES)
    for checksums in (False, True):
        job.change()
        ranks.sync(job.broadcasters, job.receivers, checksums=checksums)
        for worker, memory in job.memories.items():
            check_tensors(memory, job.expected(worker))
            check_order(memory, job.sinks[WORKERS[worker]])
    ranks.verify(job.broadcasters, job.receivers)
    assert all(memory.events[0] == "begin" and memory.events[-1] == "commit" for memory in job.memories.values())


def check_tensors(memory: Memory, expected: dict[Key, torch.Tensor]) -> None:
    got = memory.all_tensors()
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bytes(got[key], tensor), key


def check_order(memory: Memory, sink: Sink) -> None:
    """Check that every stage is finished once. (`Memory` itself refuses moves that come after their stage.)"""
    begin, *finishes, commit = memory.events
    assert (begin, commit) == ("begin", "commit")
    assert sorted(finishes) == sorted({f"finish {stage}" for stage, _ in sink.initial if stage is not None})


def test_random_jobs_hold_every_kind() -> None:
    """Check that the test above covers every combination."""
    jobs = [Job(seed, senders=1) for seed in range(SEEDS)]
    messages = [message for job in jobs for lane in job.plan.lanes for message in lane.messages]
    moves = [move for job in jobs for sink in job.sinks.values() for move in sink.moves()]
    assert {(m.stage is None, m.region.is_contiguous, m.in_place) for m in messages} == KINDS
    assert {(m.stage is None, len(m.pieces) > 1, m.in_place) for m in messages} == KINDS | {(True, False, True)}
    assert {(m.source.is_contiguous, m.source.dtype == m.region.dtype, m.stage is None) for m in moves} == ALL
    assert any(0 in move.source.stride for move in moves)
    assert any(move.source.numel == 1 and set(move.source.stride) - {0, 1} for move in moves)
    assert any(move.region.numel == 1 and set(move.region.stride) - {0, 1} for move in moves)
    assert any(len(lane.buckets) > 20 for job in jobs for lane in job.plan.lanes)


@pytest.mark.parametrize("senders", [1, 2])
def test_every_worker_gets_exactly_its_bytes(ranks: Ranks, senders: int) -> None:
    job = Job(3, senders=senders)
    sent = [ranks.start(send, broadcaster, ranks.senders) for broadcaster in job.broadcasters]
    taps = {worker: Tapped(ranks.workers[worker]) for worker in job.receivers}
    received = [ranks.start(receive, receiver, taps[w]) for w, receiver in job.receivers.items()]
    all_results(*received, *sent)
    for worker, name in enumerate(WORKERS):
        assert taps[worker].nbytes == job.plan.lane_of(worker).nbytes == job.sinks[name].wire_bytes
        assert taps[worker].broadcasts == len(job.plan.lane_of(worker).buckets)


def test_every_sending_rank_gathers_every_weight(ranks: Ranks) -> None:
    job = Job(5, senders=2)
    ranks.sync(job.broadcasters, job.receivers)
    assert [source.gathered for source in job.sources] == [list(job.plan.gather_order)] * 2
