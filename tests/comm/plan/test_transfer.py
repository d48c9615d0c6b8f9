"""Lanes and the order of gathering: who sends what to whom, the same on both sides."""

import random
from dataclasses import fields, replace

import pytest
import torch
from moves import random_sink, random_weights, whole_moves

from rollcast.comm import (
    Holders,
    Lane,
    Manifest,
    Move,
    ParamSpec,
    Region,
    TransferPlan,
    WeightSource,
    build_transfer,
)
from rollcast.comm.plan.transfer import memory_order

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
BASE = (("a", (4, 100), F32), ("c", (8,), I8))


def manifest(*rows: tuple[str, tuple[int, ...], torch.dtype]) -> Manifest:
    return Manifest(tuple(ParamSpec(*row) for row in rows))


def plan_of(rows=BASE, *, workers=("w",), senders: int = 1, bucket_bytes: int = 1024) -> TransferPlan:
    """Plan for workers that all keep everything; workers of different names have lanes of their own."""
    landings = {name: whole_moves(manifest(*rows)) for name in dict.fromkeys(workers)}
    holders = Holders.replicated(manifest(*rows), senders)
    return build_transfer(holders, landings, workers, bucket_bytes=bucket_bytes)


def flat(param: int, target: str, start: int = 0, *, numel: int = 4, stage: int | None = None) -> Move:
    return Move(param, Region.whole((numel,), F32), target, Region((numel,), (1,), start, F32), stage)


def test_whole_moves_are_every_parameter_in_place() -> None:
    rows = (("a", (2, 3), F32), ("none", (0, 4), F32), ("s", (), BF16), ("b", (5, 1, 2), I8))
    moves = whole_moves(manifest(*rows))
    assert [(move.param, move.target, move.stage, move.in_place) for move in moves] == [
        (0, "a", None, True),
        (2, "s", None, True),
        (3, "b", None, True),
    ]
    for move in moves:
        _, shape, dtype = rows[move.param]
        assert move.source == move.region == Region.of(torch.empty(shape, dtype=dtype))


def test_a_plan_counts_the_bytes_that_travel_whatever_the_trainer_has() -> None:
    """Workers choose the dtypes; where they differ, the plan states the widest."""
    held = manifest(("a", (100,), F32), ("b", (10,), F32), ("c", (10,), BF16))
    narrow = whole_moves(manifest(("a", (100,), BF16), ("b", (10,), BF16), ("c", (10,), BF16)))
    wide = whole_moves(manifest(("a", (100,), BF16), ("b", (10,), F32), ("c", (10,), BF16)))
    plan = build_transfer(Holders.replicated(held, 1), {"n": narrow, "w": wide}, ["n", "w"], bucket_bytes=1024)
    assert [spec.dtype for spec in plan.manifest.specs] == [BF16, F32, BF16]
    assert plan.manifest.nbytes == 200 + 40 + 20
    assert [lane.nbytes for lane in plan.lanes] == [240, 260]
    other = build_transfer(Holders.replicated(held, 1), {"n": narrow, "w": narrow}, ["n", "w"], bucket_bytes=1024)
    assert other.digest != plan.digest


ORDERS: dict[str, tuple[list[list[Move]], tuple[int, ...]]] = {
    "memory, not manifest": ([[flat(2, "x"), flat(0, "y"), flat(1, "z")]], (2, 0, 1)),
    "positions in one target": ([[flat(0, "x", 8), flat(1, "x", 0), flat(2, "x", 4)]], (1, 2, 0)),
    "first of two positions": ([[flat(1, "y"), flat(0, "x"), flat(1, "z")], [flat(0, "w"), flat(1, "v")]], (1, 0)),
    "second worker's rest": ([[flat(0, "x"), flat(2, "y")], [flat(2, "y"), flat(0, "x"), flat(1, "z")]], (0, 2, 1)),
    "experts in turns": (
        [[flat(0, "e", 0), flat(1, "e", 4)], [flat(2, "e", 0), flat(3, "e", 4)]],
        (0, 2, 1, 3),
    ),
    "stages apart": ([[flat(1, "x", stage=0), flat(2, "x", stage=1), flat(0, "x", 4, stage=0)]], (1, 0, 2)),
    "same position": ([[flat(1, "x"), flat(0, "x")]], (0, 1)),
    "not kept": ([[flat(3, "x"), flat(1, "y")]], (3, 1)),
    "nothing": ([[]], ()),
}


@pytest.mark.parametrize(("landings", "expected"), ORDERS.values(), ids=ORDERS)
def test_parameters_are_gathered_in_the_order_of_the_workers_memory(
    landings: list[list[Move]], expected: tuple[int, ...]
) -> None:
    assert memory_order(landings) == expected


def test_a_plan_has_the_gather_order_of_its_workers() -> None:
    moves = whole_moves(manifest(*BASE))
    plan = build_transfer(Holders.replicated(manifest(*BASE), 1), {"w": moves[::-1]}, ["w"], bucket_bytes=1024)
    assert plan.order == (1, 0)
    assert [message.target for message in plan.lanes[0].messages] == ["c", "a", "a"]


def test_workers_with_equal_digests_share_a_lane() -> None:
    plan = plan_of(workers=("p", "q", "p", "r", "q", "p"))
    assert [lane.workers for lane in plan.lanes] == [(0, 2, 5), (1, 4), (3,)]
    assert [plan.lanes_of(worker)[0].index for worker in range(6)] == [0, 1, 0, 2, 1, 0]
    assert [lane.index for lane in plan.lanes] == [0, 1, 2]


def test_workers_have_a_lane_from_every_rank_that_sends_them_anything() -> None:
    plan = plan_of(workers=("p", "q", "p"), senders=3)
    assert [(lane.sender, lane.workers) for lane in plan.lanes] == [(0, (0, 2)), (1, (0, 2)), (0, (1,)), (1, (1,))]
    assert [[lane.index for lane in plan.lanes_of(worker)] for worker in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_bytes_of_a_lane_are_those_of_its_messages() -> None:
    lane = plan_of(bucket_bytes=256).lanes[0]
    assert lane.nbytes == 1600 + 8
    assert [m for bucket in lane.buckets for m in bucket.messages] == list(lane.messages)
    assert len(lane.messages) == 7 + 1


@pytest.mark.parametrize("kept", [[], [0], [2]], ids=["none", "first", "last"])
def test_a_parameter_that_no_worker_has_a_place_for_is_not_sent(kept: list[int]) -> None:
    specs = manifest(("a", (2, 2), F32), ("none", (0,), F32), ("z", (3,), BF16))
    moves = [move for move in whole_moves(specs) if move.param in kept]
    plan = build_transfer(Holders.replicated(specs, 1), {"w": moves, "v": moves[:1]}, ["w", "v"], bucket_bytes=256)
    assert plan.order == tuple(kept)
    assert [spec.name for spec in plan.skipped] == [name for param, name in ((0, "a"), (2, "z")) if param not in kept]


def test_every_parameter_needs_one_worker_only() -> None:
    specs = manifest(("a", (2,), F32), ("none", (0,), F32), ("z", (3,), BF16))
    first, second = whole_moves(specs)
    plan = build_transfer(Holders.replicated(specs, 1), {"w": [second], "v": [first]}, ["v", "w"], bucket_bytes=256)
    assert [[message.target for message in plan.lanes_of(worker)[0].messages] for worker in (0, 1)] == [["a"], ["z"]]
    assert plan.order == (2, 0)


@pytest.mark.parametrize("seed", range(20))
def test_both_sides_make_equal_plans_and_digests(seed: int) -> None:
    rng = random.Random(seed)
    specs = WeightSource(random_weights(rng)).manifest
    moves, bucket_bytes = random_sink(rng, specs).moves(), rng.choice([256, 1024, 65537])
    plans = [
        build_transfer(Holders.replicated(side, 1), {"w": tuple(moves)}, ["w"], bucket_bytes=bucket_bytes)
        for side in (specs, Manifest.from_bytes(specs.to_bytes()))
    ]
    assert plans[0] == plans[1]
    assert plans[0].digest == plans[1].digest
    assert plans[0].lanes[0].digest == plans[1].lanes[0].digest


@pytest.mark.parametrize(
    ("rows", "bucket_bytes"),
    [
        ([("b", (4, 100), F32), BASE[1]], 1024),
        ([("a", (100, 4), F32), BASE[1]], 1024),
        ([("a", (4, 100), torch.int32), BASE[1]], 1024),
        ([BASE[0], ("c", (8,), torch.bool)], 1024),
        ([BASE[1], BASE[0]], 1024),
        ([BASE[0]], 1024),
        ([*BASE, ("none", (0,), F32)], 1024),
        (BASE, 1280),
    ],
    ids=["name", "shape", "dtype", "last dtype", "order", "fewer", "empty", "bucket_bytes"],
)
def test_digest_changes_with_anything_that_matters(rows, bucket_bytes: int) -> None:
    assert plan_of(rows, bucket_bytes=bucket_bytes).digest != plan_of().digest


def test_digest_changes_with_who_sends_to_whom() -> None:
    plans = [
        plan_of(workers=("p", "q")),
        plan_of(workers=("p", "q"), senders=2),
        plan_of(workers=("p", "q", "p")),
        plan_of(workers=("p", "q", "q")),
        plan_of(workers=("p", "p")),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    other = replace(plans[0], order=plans[0].order[::-1])
    assert other.digest != plans[0].digest


def test_digest_of_a_lane_changes_with_every_field_of_its_messages() -> None:
    """Its sender and its workers do not matter: a worker knows only what it keeps."""
    lane = plan_of().lanes[0]
    bucket, message = lane.buckets[0], lane.messages[0]
    region, piece = message.region, message.pieces[0][1]
    regions = [replace(region, **{name: value}) for name, value in REGION_CHANGES.items()]
    messages = [replace(message, **{name: value}) for name, value in MESSAGE_CHANGES.items()]
    messages += [replace(message, region=changed) for changed in regions]
    messages += [replace(message, pieces=((0, replace(piece, **{k: v})),)) for k, v in REGION_CHANGES.items()]
    buckets = [replace(bucket, messages=(changed, *bucket.messages[1:])) for changed in messages]
    buckets += [replace(bucket, nbytes=1), replace(bucket, finishes=(0,)), replace(bucket, messages=())]
    lanes = [lane, *(replace(lane, buckets=(changed, *lane.buckets[1:])) for changed in buckets)]
    lanes += [replace(lane, buckets=()), replace(lane, buckets=lane.buckets[::-1])]
    assert len({changed.digest for changed in lanes}) == len(lanes)
    assert Lane(7, 3, (1, 2), lane.buckets).digest == lane.digest
    assert set(MESSAGE_CHANGES) | {"region"} == {field.name for field in fields(message)}


REGION_CHANGES = {"shape": (9,), "stride": (7,), "offset": 3, "dtype": BF16}
MESSAGE_CHANGES = {
    "target": "other",
    "stage": 0,
    "pieces": ((1, Region.whole((256,), F32)),),
    "in_place": False,
    "nbytes": 1,
    "offset": 256,
}
