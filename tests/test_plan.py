"""Cutting a manifest into buckets: a table, and every rule of a plan on random manifests."""

import random
from itertools import pairwise

import pytest
import torch

from rollcast.comm import BucketPlan, Manifest, ParamSpec, build_plan
from rollcast.comm.plan import ALIGN_BYTES

DTYPES = (torch.bool, torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.complex128)

# Sizes in elements, dtype, bucket_bytes, and for each bucket: its bytes and (param, start, numel, offset).
TABLE = {
    "one": ([100], torch.uint8, 1024, [(100, [(0, 0, 100, 0)])]),
    "aligned": ([100, 7], torch.uint8, 1024, [(263, [(0, 0, 100, 0), (1, 0, 7, 256)])]),
    "exact fit": ([512, 512], torch.uint8, 1024, [(1024, [(0, 0, 512, 0), (1, 0, 512, 512)])]),
    "one byte over": ([512, 513], torch.uint8, 1024, [(512, [(0, 0, 512, 0)]), (513, [(1, 0, 513, 0)])]),
    "split": (
        [2500, 100],
        torch.uint8,
        1024,
        [(1024, [(0, 0, 1024, 0)]), (1024, [(0, 1024, 1024, 0)]), (612, [(0, 2048, 452, 0), (1, 0, 100, 512)])],
    ),
    "split starts a bucket": (
        [100, 1500],
        torch.uint8,
        1024,
        [(100, [(0, 0, 100, 0)]), (1024, [(1, 0, 1024, 0)]), (476, [(1, 1024, 476, 0)])],
    ),
    "many times": ([768], torch.uint8, 256, [(256, [(0, start, 256, 0)]) for start in (0, 256, 512)]),
    "odd bucket": ([300], torch.float32, 1022, [(1020, [(0, 0, 255, 0)]), (180, [(0, 255, 45, 0)])]),
    "zero elements": ([0, 3, 0], torch.float32, 1024, [(256, [(0, 0, 0, 0), (1, 0, 3, 0), (2, 0, 0, 256)])]),
    "only zero elements": ([0], torch.float32, 1024, [(0, [(0, 0, 0, 0)])]),
    "zero after full": ([1024, 0], torch.uint8, 1024, [(1024, [(0, 0, 1024, 0), (1, 0, 0, 1024)])]),
}


@pytest.mark.parametrize(("sizes", "dtype", "bucket_bytes", "expected"), TABLE.values(), ids=TABLE)
def test_table(sizes: list[int], dtype: torch.dtype, bucket_bytes: int, expected: list) -> None:
    plan = build_plan(uniform(sizes, dtype), bucket_bytes=bucket_bytes)
    got = [(b.nbytes, [(s.param, s.start, s.numel, s.offset) for s in b.slots]) for b in plan.buckets]
    assert got == expected
    assert plan.nbytes == sum(nbytes for nbytes, _ in expected)
    assert plan.buffer_bytes == max(nbytes for nbytes, _ in expected)


def test_scalar_takes_one_element() -> None:
    plan = build_plan(Manifest((ParamSpec("s", (), torch.float32),)), bucket_bytes=256)
    assert [(slot.start, slot.numel) for slot in plan.buckets[0].slots] == [(0, 1)]


@pytest.mark.parametrize("seed", range(30))
def test_random_plans_keep_every_rule(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        manifest = random_manifest(rng)
        plan = build_plan(manifest, bucket_bytes=rng.choice([256, 300, 1024, 4096, 65537]))
        check_every_element_travels_once_in_order(plan)
        check_slots_lie_in_their_buckets(plan)
        check_only_the_oversized_are_split(plan)
        assert build_plan(Manifest.from_bytes(manifest.to_bytes()), bucket_bytes=plan.bucket_bytes) == plan


def test_random_manifests_hold_every_kind() -> None:
    """The property test means nothing without split, zero-element and scalar parameters."""
    rng = random.Random(0)
    specs = [spec for _ in range(30) for spec in random_manifest(rng).specs]
    assert {spec.dtype for spec in specs} == set(DTYPES)
    assert any(spec.shape == () for spec in specs)
    assert any(spec.numel == 0 for spec in specs)
    assert any(spec.nbytes > 20 * 4096 for spec in specs)


def check_every_element_travels_once_in_order(plan: BucketPlan) -> None:
    elements: list[tuple[int, int, int]] = []
    for slot in (slot for bucket in plan.buckets for slot in bucket.slots):
        elements.append((slot.param, slot.start, slot.start + slot.numel))
    for index, spec in enumerate(plan.manifest.specs):
        runs = [(start, stop) for param, start, stop in elements if param == index]
        assert runs, f"{spec} has no slot"
        assert runs[0][0] == 0
        assert runs[-1][1] == spec.numel
        assert all(left[1] == right[0] for left, right in pairwise(runs))
    assert [param for param, _, _ in elements] == sorted(param for param, _, _ in elements)


def check_slots_lie_in_their_buckets(plan: BucketPlan) -> None:
    for bucket in plan.buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.offset % ALIGN_BYTES == 0
            assert slot.offset >= end
            end = slot.offset + slot.numel * plan.manifest.specs[slot.param].dtype.itemsize
        assert bucket.slots
        assert end == bucket.nbytes <= plan.bucket_bytes
    assert plan.buffer_bytes == max(bucket.nbytes for bucket in plan.buckets)
    assert plan.nbytes == sum(bucket.nbytes for bucket in plan.buckets)


def check_only_the_oversized_are_split(plan: BucketPlan) -> None:
    pieces = [0] * len(plan.manifest.specs)
    for bucket in plan.buckets:
        for slot in bucket.slots:
            pieces[slot.param] += 1
    for spec, count in zip(plan.manifest.specs, pieces, strict=True):
        bucket_elements = plan.bucket_bytes // spec.dtype.itemsize
        assert count == max(1, -(-spec.numel // bucket_elements))


def test_digest_is_equal_on_both_sides() -> None:
    manifest = random_manifest(random.Random(1))
    theirs = build_plan(Manifest.from_bytes(manifest.to_bytes()), bucket_bytes=1024)
    assert build_plan(manifest, bucket_bytes=1024).digest == theirs.digest


@pytest.mark.parametrize(
    ("rows", "bucket_bytes"),
    [
        ([("b", (4, 100), torch.float32), ("c", (8,), torch.int8)], 1024),
        ([("a", (100, 4), torch.float32), ("c", (8,), torch.int8)], 1024),
        ([("a", (4, 100), torch.int32), ("c", (8,), torch.int8)], 1024),
        ([("a", (4, 100), torch.float32), ("c", (8,), torch.bool)], 1024),
        ([("c", (8,), torch.int8), ("a", (4, 100), torch.float32)], 1024),
        ([("a", (4, 100), torch.float32)], 1024),
        ([("a", (4, 100), torch.float32), ("c", (8,), torch.int8)], 1280),
    ],
    ids=["name", "shape", "dtype", "last dtype", "order", "fewer", "bucket_bytes"],
)
def test_digest_changes_with_anything_that_matters(rows: list, bucket_bytes: int) -> None:
    base = Manifest((ParamSpec("a", (4, 100), torch.float32), ParamSpec("c", (8,), torch.int8)))
    other = Manifest(tuple(ParamSpec(*row) for row in rows))
    assert build_plan(other, bucket_bytes=bucket_bytes).digest != build_plan(base, bucket_bytes=1024).digest


@pytest.mark.parametrize("bucket_bytes", [ALIGN_BYTES - 1, 1, 0, -1024])
def test_bucket_bytes_too_small_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at least {ALIGN_BYTES}, got {bucket_bytes}"):
        build_plan(uniform([1], torch.uint8), bucket_bytes=bucket_bytes)


def uniform(sizes: list[int], dtype: torch.dtype) -> Manifest:
    """Flat parameters of one dtype."""
    return Manifest(tuple(ParamSpec(f"p{index}", (size,), dtype) for index, size in enumerate(sizes)))


def random_manifest(rng: random.Random) -> Manifest:
    """Scalars, zero-element tensors, small ones, and ones of many times any bucket."""
    shapes = [
        (),
        (0,),
        (3, 0),
        (rng.randint(1, 40),),
        (rng.randint(1, 60), rng.randint(1, 60)),
        (rng.randint(1, 9000),),
    ]
    return Manifest(
        tuple(
            ParamSpec(f"layer.{index}", rng.choice(shapes), rng.choice(DTYPES)) for index in range(rng.randint(1, 25))
        )
    )
