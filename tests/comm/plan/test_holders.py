"""Who sends what of each parameter: everything once, holes and contradictions by name."""

import random
import re
from math import prod

import pytest
import torch
from moves import whole_moves
from shards import indices

from rollcast.comm import Box, HeldParam, Holders, Manifest, ParamSpec, build_transfer
from rollcast.comm.plan.holders import MAX_REPLICAS, SPLIT_BYTES

F32, BF16 = torch.float32, torch.bfloat16
SPEC = ParamSpec("w", (6, 4), F32)


def rows(start: int, stop: int, spec: ParamSpec = SPEC) -> HeldParam:
    """A rank's rows of a parameter."""
    return HeldParam(spec, (Box(spec.shape, (start, 0), (stop, spec.shape[1])),))


def whole(*specs: ParamSpec) -> list[HeldParam]:
    return [HeldParam(spec, (Box.whole(spec.shape),)) for spec in specs]


def test_each_rank_sends_its_own_rows() -> None:
    holders = Holders.of([[rows(0, 4)], [rows(4, 6)], [rows(6, 6)]])
    assert holders.shares() == {0: {0: [*rows(0, 4).boxes]}, 1: {0: [*rows(4, 6).boxes]}}


def test_parameters_that_only_some_ranks_have_are_all_sent() -> None:
    a, b, c = (ParamSpec(name, (2,), F32) for name in "abc")
    holders = Holders.of([whole(b, a), whole(c, b)])
    assert [spec.name for spec in holders.manifest.specs] == ["b", "a", "c"]
    assert {rank: sorted(boxes) for rank, boxes in holders.shares().items()} == {0: [0, 1], 1: [2]}


def test_replicas_share_the_work() -> None:
    """Small parameters one by one, large ones by rows."""
    small = [ParamSpec(f"p{index}", (1 << 10,), F32) for index in range(40)]
    large = ParamSpec("large", (SPLIT_BYTES // 64, 32), F32)
    shares = Holders.of([whole(large, *small)] * 3).shares()
    sent = {rank: sum(box.numel for boxes in share.values() for box in boxes) for rank, share in shares.items()}
    assert sum(sent.values()) == 40 * 1024 + SPLIT_BYTES // 2
    assert max(sent.values()) - min(sent.values()) <= 1024
    assert [len(share[0]) for share in shares.values()] == [1, 1, 1]


def test_at_most_some_replicas_send() -> None:
    specs = [ParamSpec(f"p{index}", (4,), F32) for index in range(100)]
    assert len(Holders.of([whole(*specs)] * 20).shares()) == MAX_REPLICAS


def test_a_preferred_rank_sends_all_that_it_holds() -> None:
    specs = [ParamSpec(f"p{index}", (4,), F32) for index in range(9)]
    assert Holders.of([whole(*specs)] * 3).shares(preferred=2).keys() == {2}
    shares = Holders.of([[rows(0, 4)], [rows(2, 6)]]).shares(preferred=1)
    assert sum(box.numel for boxes in shares[1].values() for box in boxes) >= 8


@pytest.mark.parametrize("seed", range(100))
def test_every_element_is_sent_once_however_parts_overlap(seed: int) -> None:
    rng = random.Random(seed)
    shape = (rng.randint(1, 7), rng.randint(1, 5), rng.randint(1, 4))
    spec = ParamSpec("w", shape, F32)
    statements = [[HeldParam(spec, tuple(random_box(rng, shape) for _ in range(2)))] for _ in range(3)]
    statements.append(whole(spec))
    marks = torch.zeros(shape, dtype=torch.int)
    for rank, share in Holders.of(statements).shares(preferred=rng.choice([None, 1])).items():
        for box in share[0]:
            part = indices(box)
            marks[part] += 1
            assert any(_inside(box, held) for held in statements[rank][0].boxes)
    assert torch.equal(marks, torch.ones_like(marks))


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    start = tuple(rng.randrange(size) for size in shape)
    return Box(shape, start, tuple(rng.randint(first, size) for first, size in zip(start, shape, strict=True)))


def _inside(box: Box, other: Box) -> bool:
    return not box.minus(other)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ([[rows(0, 2)], [rows(3, 6)]], "no trainer rank holds [2:3, 0:4] of [6, 4] of parameter w [6, 4] float32"),
        ([[rows(0, 2)]], "no trainer rank holds [2:6, 0:4] of [6, 4] of parameter w"),
        (
            [whole(SPEC), whole(ParamSpec("w", (6, 4), BF16))],
            "trainer ranks 0 and 1 disagree about parameter w: w [6, 4] float32 against w [6, 4] bfloat16",
        ),
        (
            [[], whole(ParamSpec("v", (1,), F32)), [rows(0, 6)], [rows(0, 6, ParamSpec("w", (6, 5), F32))]],
            "trainer ranks 2 and 3 disagree about parameter w",
        ),
        (
            [[HeldParam(SPEC, (Box((24,), (0,), (12,)),))], [rows(3, 6)]],
            "hold of parameter w [6, 4] float32 with different shapes: [6, 4] (rank 1) and [24] (rank 0)",
        ),
        (
            [[HeldParam(SPEC, (Box((25,), (0,), (12,)),))]],
            "[0:12] of [25] on trainer rank 0 cannot be a part of parameter w [6, 4] float32",
        ),
        ([[], []], "no trainer rank has any parameter to send"),
    ],
)
def test_holes_and_contradictions_are_named(statements: list[list[HeldParam]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Holders.of(statements)


def test_a_whole_parameter_may_be_seen_with_any_shape() -> None:
    flat = HeldParam(SPEC, (Box((24,), (0,), (24,)),))
    assert Holders.of([[flat], [rows(0, 6)]]).parts == (((0, Box.whole((6, 4))), (1, Box.whole((6, 4)))),)


def test_workers_with_several_lanes_have_no_more_buffers() -> None:
    manifest = Manifest((ParamSpec("w", (64, 1024), F32),))
    landings = {"a": whole_moves(manifest)}
    for ranks in (1, 2, 4):
        each = 64 // ranks
        statements = [[rows(each * rank, each * (rank + 1), manifest.specs[0])] for rank in range(ranks)]
        plan = build_transfer(Holders.of(statements), landings, ["a"], bucket_bytes=1 << 16)
        assert len(plan.lanes_of(0)) == ranks
        assert sum(max(bucket.nbytes for bucket in lane.buckets) for lane in plan.lanes_of(0)) == 1 << 16
        assert sum(lane.nbytes for lane in plan.lanes_of(0)) == prod(manifest.specs[0].shape) * 4
