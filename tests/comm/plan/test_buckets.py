"""Moves as messages and buckets: tables, and every rule on random moves."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from moves import Sink, indices, random_sink, random_weights, whole_moves

from rollcast.comm import Bucket, Manifest, Message, Move, ParamSpec, Region, WeightSource, fill_buckets
from rollcast.comm.device.storage import ALIGN_BYTES, aligned
from rollcast.comm.plan.buckets import LARGE_BYTES

U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
Cut = list[tuple[int, list[tuple[int, int, int, int]]]]

# Sizes in elements, dtype, bucket_bytes, and for each bucket: its bytes and (param, start, numel, offset).
WHOLE: dict[str, tuple[list[int], torch.dtype, int, Cut]] = {
    "one": ([100], U8, 1024, [(100, [(0, 0, 100, 0)])]),
    "aligned": ([100, 7], U8, 1024, [(263, [(0, 0, 100, 0), (1, 0, 7, 256)])]),
    "exact fit": ([512, 512], U8, 1024, [(1024, [(0, 0, 512, 0), (1, 0, 512, 512)])]),
    "one byte over": ([512, 513], U8, 1024, [(512, [(0, 0, 512, 0)]), (513, [(1, 0, 513, 0)])]),
    "over by its alignment": (
        [511, 2, 512],
        U8,
        1024,
        [(514, [(0, 0, 511, 0), (1, 0, 2, 512)]), (512, [(2, 0, 512, 0)])],
    ),
    "split": (
        [2500, 100],
        U8,
        1024,
        [(1024, [(0, 0, 1024, 0)]), (1024, [(0, 1024, 1024, 0)]), (612, [(0, 2048, 452, 0), (1, 0, 100, 512)])],
    ),
    "split starts a bucket": (
        [100, 1500],
        U8,
        1024,
        [(100, [(0, 0, 100, 0)]), (1024, [(1, 0, 1024, 0)]), (476, [(1, 1024, 476, 0)])],
    ),
    "many times": ([768], U8, 256, [(256, [(0, start, 256, 0)]) for start in (0, 256, 512)]),
    "odd bucket": ([300], F32, 1022, [(1020, [(0, 0, 255, 0)]), (180, [(0, 255, 45, 0)])]),
    "zero elements": ([0, 3, 0], F32, 1024, [(12, [(1, 0, 3, 0)])]),
    "only zero elements": ([0], F32, 1024, []),
}

# Moves of a flat parameter each, (numel, target, offset, stage), in uint8 with buckets of 1024 bytes; and the
# messages: (pieces, offset in the target), with "|" where a bucket ends.
Row = tuple[int, str, int, int | None]
MERGED: dict[str, tuple[list[Row], str]] = {
    "adjoining": ([(10, "t", 0, None), (20, "t", 10, None), (30, "t", 30, None)], "t[0:60]x3 |"),
    "gap": ([(10, "t", 0, None), (20, "t", 11, None)], "t[0:10]x1 t[11:31]x1 |"),
    "overlap": ([(10, "t", 0, None), (20, "t", 9, None)], "t[0:10]x1 t[9:29]x1 |"),
    "backwards": ([(10, "t", 20, None), (20, "t", 0, None)], "t[20:30]x1 t[0:20]x1 |"),
    "other target": ([(10, "t", 0, None), (20, "u", 10, None)], "t[0:10]x1 u[10:30]x1 |"),
    "staged": ([(10, "t", 0, 4), (20, "t", 10, 4)], "t[0:30]x2 |"),
    "live, then staged": ([(10, "t", 0, None), (20, "t", 10, 4)], "t[0:10]x1 t[10:30]x1 |"),
    "stage after stage": (
        [(10, "t", 0, 4), (20, "t", 10, 5), (9, "u", 0, None)],
        "t[0:10]x1 | t[10:30]x1 | u[0:9]x1 |",
    ),
    "stages in turns": (
        [(10, "t", 0, 4), (10, "u", 0, 5), (10, "t", 10, 4), (10, "u", 10, 5)],
        "t[0:10]x1 u[0:10]x1 t[10:20]x1 | u[10:20]x1 |",
    ),
    "fills a bucket": ([(512, "t", 0, None), (512, "t", 512, None)], "t[0:1024]x2 |"),
    "too much": ([(512, "t", 0, None), (513, "t", 512, None)], "t[0:512]x1 | t[512:1025]x1 |"),
    "tail of a split": ([(1500, "t", 0, None), (100, "t", 1500, None)], "t[0:1024]x1 | t[1024:1600]x2 |"),
}


@pytest.mark.parametrize(("sizes", "dtype", "bucket_bytes", "expected"), WHOLE.values(), ids=WHOLE)
def test_table_of_whole_parameters(sizes: list[int], dtype: torch.dtype, bucket_bytes: int, expected: Cut) -> None:
    specs = tuple(ParamSpec(f"p{index}", (size,), dtype) for index, size in enumerate(sizes))
    buckets = fill_buckets(whole_moves(Manifest(specs)), range(len(sizes)), bucket_bytes=bucket_bytes)
    got = [(b.nbytes, [(p, r.offset, r.numel, m.offset) for m in b.messages for p, r in m.pieces]) for b in buckets]
    assert got == expected


@pytest.mark.parametrize(("rows", "expected"), MERGED.values(), ids=MERGED)
def test_table_of_merged_moves(rows: list[Row], expected: str) -> None:
    moves = [
        Move(param, Region.whole((numel,), U8), target, Region((numel,), (1,), offset, U8), stage)
        for param, (numel, target, offset, stage) in enumerate(rows)
    ]
    buckets = fill_buckets(moves, range(len(moves)), bucket_bytes=1024)
    assert " ".join(f"{' '.join(f'{m}x{len(m.pieces)}' for m in b.messages)} |" for b in buckets) == expected
    assert all(message.in_place is (message.stage is None) for bucket in buckets for message in bucket.messages)


@pytest.mark.parametrize("strided", ["both", "first", "second"])
def test_strided_targets_are_not_merged(strided: str) -> None:
    """Columns 0 and 1, and 4 and 5, of a target: the second starts where a contiguous first would end."""
    regions = [Region((2, 2), (8, 1) if strided in ("both", name) else (2, 1), 0, U8) for name in ("first", "second")]
    regions[1] = replace(regions[1], offset=4)
    moves = [Move(param, Region.whole((2, 2), U8), "t", region) for param, region in enumerate(regions)]
    (bucket,) = fill_buckets(moves, [0, 1], bucket_bytes=1024)
    assert [message.region for message in bucket.messages] == regions


def test_moves_without_elements_are_not_sent() -> None:
    nothing, some = Region.whole((0, 4), U8), Region.whole((3,), U8)
    moves = [Move(0, nothing, "t", nothing), Move(1, some, "t", some)]
    (bucket,) = fill_buckets(moves, [0, 1], bucket_bytes=1024)
    assert [message.pieces for message in bucket.messages] == [((1, some),)]
    assert fill_buckets(moves[:1], [0], bucket_bytes=1024) == ()


def test_scalar_takes_one_element() -> None:
    (bucket,) = fill_buckets(whole_moves(Manifest((ParamSpec("s", (), F32),))), [0], bucket_bytes=256)
    assert [(message.region.numel, message.nbytes) for message in bucket.messages] == [(1, 4)]


@pytest.mark.parametrize("numel", [1, 3])
@pytest.mark.parametrize("cast", [False, True], ids=["bytes", "cast"])
@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "strided"])
@pytest.mark.parametrize("stage", [None, 0], ids=["live", "staged"])
def test_in_place_is_live_contiguous_and_of_the_wires_dtype(
    numel: int, cast: bool, step: int, stage: int | None
) -> None:
    region = Region((numel,), (step,), 5, F32 if cast else BF16)
    move = Move(0, Region.whole((numel,), BF16), "t", region, stage)
    (bucket,) = fill_buckets([move], [0], bucket_bytes=256)
    expected = stage is None and not cast and (step == 1 or numel == 1)
    assert move.in_place is bucket.messages[0].in_place is expected
    assert move.nbytes == bucket.messages[0].nbytes == bucket.nbytes == 2 * numel


@pytest.mark.parametrize("numels", [(LARGE_BYTES, 8), (8, LARGE_BYTES)], ids=["large, small", "small, large"])
def test_large_contiguous_pieces_are_not_merged(numels: tuple[int, int]) -> None:
    assert messages_of(numels, shape=lambda numel: (numel,)) == [1, 1]
    assert messages_of([numel - 8 for numel in numels if numel > 8] + [8], shape=lambda numel: (numel,)) == [2]


def test_large_strided_pieces_are_merged() -> None:
    """They have to be copied anyway."""
    assert messages_of((LARGE_BYTES, 8), shape=lambda numel: (2, numel // 2), strided=True) == [2]


def messages_of(numels, *, shape, strided: bool = False) -> list[int]:
    """Return how many pieces each message has when parts of `numels` bytes adjoin in one target."""
    moves, start = [], 0
    for param, numel in enumerate(numels):
        source = Region.whole(shape(numel), U8)
        source = Region(source.shape[::-1], source.stride[::-1], 0, U8) if strided else source
        moves.append(Move(param, source, "t", Region(source.shape, Region.whole(source.shape, U8).stride, start, U8)))
        start += numel
    buckets = fill_buckets(moves, range(len(numels)), bucket_bytes=4 * LARGE_BYTES)
    return [len(message.pieces) for bucket in buckets for message in bucket.messages]


@pytest.mark.parametrize("bucket_bytes", [ALIGN_BYTES - 1, 1, 0, -1024])
def test_bucket_bytes_too_small_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at least {ALIGN_BYTES}, got {bucket_bytes}"):
        fill_buckets([], [], bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("seed", range(60))
def test_random_moves_keep_every_rule(seed: int) -> None:
    rng = random.Random(seed)
    sink = random_sink(rng, WeightSource(random_weights(rng)).manifest)
    gather_order = rng.sample(range(len(sink.manifest.specs)), len(sink.manifest.specs))
    bucket_bytes = rng.choice([256, 300, 1024, 4096, 65537])
    buckets = fill_buckets(sink.moves(), gather_order, bucket_bytes=bucket_bytes)
    assert buckets == fill_buckets(sink.moves(), gather_order, bucket_bytes=bucket_bytes)
    messages = [message for bucket in buckets for message in bucket.messages]
    check_every_element_travels_once(sink, messages)
    check_messages_follow_the_gather_order(messages, gather_order)
    check_messages_lie_in_their_buckets(buckets, bucket_bytes)
    check_stages_end_their_buckets(sink, buckets)
    check_no_bucket_has_room_for_the_next(buckets, bucket_bytes)
    check_only_the_oversized_are_split(sink, messages, bucket_bytes)


def check_every_element_travels_once(sink: Sink, messages: list[Message]) -> None:
    """Check that the messages copy just the elements that torch's own copies would."""
    expected: Counter[tuple] = Counter()
    for step in sink.steps:
        numel, shape = sink.manifest.specs[step.param].numel, sink.manifest.specs[step.param].shape
        source = step.take(torch.arange(numel).view(shape)).flatten().tolist()
        place = sink.initial[step.key]
        target = step.put(torch.arange(place.numel()).view(place.shape)).flatten().tolist()
        expected.update((step.param, element, step.key, at) for element, at in zip(source, target, strict=True))
    got: Counter[tuple] = Counter()
    for m in messages:
        sources = [(p, e) for p, region in m.pieces for e in indices(region, sink.manifest.specs[p].numel)]
        places = indices(m.region, sink.initial[m.stage, m.target].numel())
        got.update((*source, (m.stage, m.target), at) for source, at in zip(sources, places, strict=True))
        assert {sink.manifest.specs[p].dtype for p, _ in m.pieces} == {m.dtype}
        assert m.region.dtype == sink.initial[m.stage, m.target].dtype
    assert got == expected


def check_messages_follow_the_gather_order(messages: list[Message], gather_order: list[int]) -> None:
    positions = [gather_order.index(param) for message in messages for param, _ in message.pieces]
    assert positions == sorted(positions)


def check_messages_lie_in_their_buckets(buckets: tuple[Bucket, ...], bucket_bytes: int) -> None:
    for bucket in buckets:
        end = 0
        for message in bucket.messages:
            assert message.offset == -(-end // ALIGN_BYTES) * ALIGN_BYTES
            assert message.nbytes == message.region.numel * message.dtype.itemsize > 0
            end = message.offset + message.nbytes
        assert 0 < end == bucket.nbytes <= bucket_bytes


def check_stages_end_their_buckets(sink: Sink, buckets: tuple[Bucket, ...]) -> None:
    last = {m.stage: m for bucket in buckets for m in bucket.messages if m.stage is not None}
    ends = {bucket.finishes: bucket.messages[-1] for bucket in buckets if bucket.finishes}
    assert ends == {(stage,): message for stage, message in last.items()}
    assert set(last) == {stage for stage, _ in sink.initial if stage is not None}


def check_no_bucket_has_room_for_the_next(buckets: tuple[Bucket, ...], bucket_bytes: int) -> None:
    for first, second in pairwise(buckets):
        assert first.finishes or aligned(first.nbytes) + second.messages[0].nbytes > bucket_bytes


def check_only_the_oversized_are_split(sink: Sink, messages: list[Message], bucket_bytes: int) -> None:
    whole = Counter((move.param, move.source) for move in sink.moves() if move.nbytes <= bucket_bytes)
    assert not whole - Counter(piece for message in messages for piece in message.pieces)
