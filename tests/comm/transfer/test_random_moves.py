"""Random moves over real gloo groups leave in every worker what torch's own copies leave, and nothing else."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from moves import Key, Sink, random_sink, random_values, random_weights, whole_moves
from ranks import CPU, Memory, Ranks, Tapped, WatchedSource, all_results, receive, receiver_of, same_bytes, send
from shards import random_shards
from sides import memory_of

from rollcast.comm import Holders, Holding, Manifest, TransferPlan, WeightBroadcaster, WeightSource, build_transfer

BUCKET_BYTES = (256, 300, 1024, 4096, 65537, 1 << 22)
SEEDS = 40
# Each joins groups of its own, which takes a second: the others are slow tests.
QUICK_SEEDS = 12
# Workers 0 and 2 keep the same.
WORKERS = ("a", "b", "a")
TRAINERS = {"one trainer": 1, "replicas": 2, "shards": 3}
ALL = set(product((False, True), repeat=3))
KINDS = ALL - {(False, False, True), (False, True, True), (True, False, True)}


def asked_for(rng: random.Random, manifest: Manifest) -> Manifest:
    """The dtypes in which a worker wants the parameters: now and then another than the trainer has."""
    floating = (torch.bfloat16, torch.float16, torch.float32)
    return Manifest(
        tuple(
            replace(spec, dtype=rng.choice(floating)) if spec.dtype in floating and rng.random() < 0.3 else spec
            for spec in manifest.specs
        )
    )


class Job:
    """Random trainers and three workers."""

    def __init__(self, seed: int, *, trainers: str) -> None:
        self.rng = rng = random.Random(seed)
        self.weights = random_weights(rng)
        dtype = rng.choice([None, torch.bfloat16, torch.float32])
        self.shards = random_shards(rng, self.weights, TRAINERS[trainers]) if trainers == "shards" else None
        held = [self.weights] * TRAINERS[trainers] if self.shards is None else self.shards.held
        self.sources = [WatchedSource(of_rank, dtype=dtype) for of_rank in held]
        self.holders = Holders.of([source.statement for source in self.sources])
        manifest = self.holders.manifest
        params = range(len(manifest.specs))
        some = rng.sample(params, rng.randint(1, len(params)))
        # The first keeps whatever the second does not.
        keeps = {"a": [p for p in params if p not in some or rng.random() < 0.5], "b": some}
        self.sinks = {name: random_sink(rng, asked_for(rng, manifest), params) for name, params in keeps.items()}
        self.plan = self._plan()
        self.broadcasters = [
            WeightBroadcaster(source, self.plan, rank=r, device=CPU) for r, source in enumerate(self.sources)
        ]
        self.memories = {worker: self.sinks[name].memory() for worker, name in enumerate(WORKERS)}
        self.receivers = {w: receiver_of(self.plan.lanes_of(w), memory) for w, memory in self.memories.items()}

    def _plan(self) -> TransferPlan:
        landings = {name: sink.moves() for name, sink in self.sinks.items()}
        bucket_bytes = self.rng.choice(BUCKET_BYTES)
        return build_transfer(self.holders, landings, WORKERS, bucket_bytes=bucket_bytes)

    def ranks(self) -> Ranks:
        return Ranks(*[lane.workers for lane in self.plan.lanes])

    def change(self) -> None:
        """Give the trainer's weights new values."""
        for tensor in self.weights.values():
            tensor.copy_(random_values(self.rng, tensor.shape, tensor.dtype))
        if self.shards is not None:
            self.shards.refresh()

    def expected(self, worker: int) -> dict[Key, torch.Tensor]:
        return self.sinks[WORKERS[worker]].expected([self.weights[spec.name] for spec in self.holders.manifest.specs])


@pytest.mark.parametrize("trainers", TRAINERS)
@pytest.mark.parametrize(
    "seed", [*range(QUICK_SEEDS), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK_SEEDS, SEEDS))]
)
def test_memory_is_what_direct_copies_leave(seed: int, trainers: str) -> None:
    job = Job(seed, trainers=trainers)
    assert {lane.workers for lane in job.plan.lanes} == {(0, 2), (1,)}
    with job.ranks() as ranks:
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
    jobs = [Job(seed, trainers="one trainer") for seed in range(SEEDS)]
    messages = [message for job in jobs for lane in job.plan.lanes for message in lane.messages]
    moves = [move for job in jobs for sink in job.sinks.values() for move in sink.moves()]
    assert {(m.stage is None, m.region.is_contiguous, m.in_place) for m in messages} == KINDS
    assert {(m.stage is None, len(m.pieces) > 1, m.in_place) for m in messages} == KINDS | {(True, False, True)}
    assert {(m.source.is_contiguous, m.source.dtype == m.region.dtype, m.stage is None) for m in moves} == ALL
    assert any(0 in move.source.stride for move in moves)
    assert any(move.source.numel == 1 and set(move.source.stride) - {0, 1} for move in moves)
    assert any(move.region.numel == 1 and set(move.region.stride) - {0, 1} for move in moves)
    assert any(len(lane.buckets) > 20 for job in jobs for lane in job.plan.lanes)


@pytest.mark.parametrize("trainers", TRAINERS)
def test_every_worker_gets_exactly_its_bytes(trainers: str) -> None:
    job = Job(3, trainers=trainers)
    with job.ranks() as ranks:
        sent = [ranks.start(send, broadcaster, ranks.senders) for broadcaster in job.broadcasters]
        taps = {
            worker: {lane: Tapped(group) for lane, group in ranks.lanes_of[worker].items()} for worker in job.receivers
        }
        received = [ranks.start(receive, receiver, taps[w]) for w, receiver in job.receivers.items()]
        all_results(*received, *sent)
    for worker, name in enumerate(WORKERS):
        for lane in job.plan.lanes_of(worker):
            tap = taps[worker][lane.index]
            assert (tap.nbytes, tap.broadcasts) == (lane.nbytes, len(lane.buckets))
        assert sum(tap.nbytes for tap in taps[worker].values()) == job.sinks[name].wire_bytes


def test_parts_that_one_rank_holds_may_overlap() -> None:
    """Each worker prefers the trainer rank of its number, whose rows 2 and up are in the second of two tensors."""
    full = torch.randn(6, 4)

    def rows(start: int, stop: int) -> Holding:
        return Holding(full[start:stop].clone(), (6, 4), (start, 0))

    sources = [WeightSource({"w": rows(2, 6)}), WeightSource({"w": (rows(0, 3), rows(2, 6))})]
    holders = Holders.of([source.statement for source in sources])
    moves = whole_moves(holders.manifest)
    plan = build_transfer(holders, {"w": moves}, ["w", "w"], bucket_bytes=1024, paired=True)
    memories = [memory_of(holders.manifest, moves) for _ in range(2)]
    receivers = {worker: receiver_of(plan.lanes_of(worker), memory) for worker, memory in enumerate(memories)}
    with Ranks(*[lane.workers for lane in plan.lanes]) as ranks:
        ranks.sync(
            [WeightBroadcaster(source, plan, rank=rank, device=CPU) for rank, source in enumerate(sources)], receivers
        )
    assert all(torch.equal(memory.tensors["w"], full) for memory in memories)


def test_ranks_read_only_what_they_hold() -> None:
    job = Job(5, trainers="shards")
    with job.ranks() as ranks:
        ranks.sync(job.broadcasters, job.receivers)
    for source in job.sources:
        own = {spec.name for spec in source.manifest.specs}
        gathered = [source.manifest.specs[param].name for param in source.gathered]
        names = [job.holders.manifest.specs[param].name for param in job.plan.order]
        assert gathered == [name for name in names if name in own]
