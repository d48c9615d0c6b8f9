"""What several tensors hold of one parameter is found, and compared bit by bit as it would be sent."""

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
import torch
from shards import indices

from rollcast.comm import Holding, WeightSource
from rollcast.comm.plan.box import Box
from rollcast.comm.plan.holders import HeldParam, Holders
from rollcast.comm.plan.manifest import ParamSpec
from rollcast.comm.transfer.replicas import replica_checksums

SHAPE = (6, 4)


def random_boxes(seed: int) -> list[Box]:
    generator = torch.Generator().manual_seed(seed)

    def ends(size: int) -> list[int]:
        return sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())

    pairs = [[ends(size) for size in SHAPE] for _ in range(5)]
    return [Box(SHAPE, tuple(a for a, _ in pair), tuple(b for _, b in pair)) for pair in pairs]


@pytest.mark.parametrize("seed", range(50))
def test_overlaps_are_all_elements_that_are_held_twice(seed: int) -> None:
    boxes = [Box.whole(SHAPE), *random_boxes(seed)]
    spec = ParamSpec("w", SHAPE, torch.float32)
    holders = Holders.of([[HeldParam(spec, (box,))] for box in boxes])
    overlaps = [overlap.box for overlap in holders.overlaps()]
    for element in range(24):
        copies = [box for box in boxes if box.has(element)]
        compared = [box for box in overlaps if box.has(element)]
        assert bool(compared) == (len(copies) > 1)
        # Each two copies are compared by some overlap that both have.
        for one, other in product(copies, copies):
            if one is not other:
                assert any(one.common(box) == box == other.common(box) for box in compared)


def test_shards_have_no_overlaps() -> None:
    spec = ParamSpec("w", SHAPE, torch.float32)
    halves = [Box(SHAPE, (0, 0), (3, 4)), Box(SHAPE, (3, 0), (6, 4))]
    assert Holders.of([[HeldParam(spec, (half,))] for half in halves]).overlaps() == []


def check(of_ranks: Sequence[Mapping[str, torch.Tensor | Holding]], dtype: torch.dtype, *, equal: bool) -> None:
    """All ranks must get the same checksums of each overlap, or must not."""
    sources = [WeightSource(weights, dtype=dtype) for weights in of_ranks]
    holders = Holders.of([source.statement for source in sources])
    overlaps = holders.overlaps()
    sums = [replica_checksums(source, holders.manifest, overlaps) for source in sources]
    by_overlap = [{each for of_rank in sums for each in of_rank.get(number, ())} for number in range(len(overlaps))]
    assert overlaps and all(by_overlap)
    assert all(len(different) == 1 for different in by_overlap) is equal


def part_of(whole: torch.Tensor, box: Box) -> Holding:
    return Holding(whole[indices(box)].clone(), whole.shape, box.start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_compared_with_wholes_and_with_parts(dtype: torch.dtype) -> None:
    whole = torch.randn(SHAPE)
    part = part_of(whole, Box(SHAPE, (1, 1), (5, 3)))
    transposed = whole.t().contiguous().t()
    check([{"w": whole}, {"w": part}, {"w": transposed}], dtype, equal=True)
    part.tensor[2, 1] += 1.0
    check([{"w": whole}, {"w": part}, {"w": transposed}], dtype, equal=False)


def test_values_are_compared_as_they_would_be_sent() -> None:
    one = torch.ones(SHAPE)
    other = one + 1e-5
    check([{"w": one}, {"w": other}], torch.bfloat16, equal=True)
    check([{"w": one}, {"w": other}], torch.float32, equal=False)


def test_nan_equals_itself_and_zeros_have_signs() -> None:
    nan = torch.full(SHAPE, float("nan"))
    check([{"w": nan}, {"w": nan.clone()}], torch.float32, equal=True)
    check([{"w": torch.zeros(SHAPE)}, {"w": -torch.zeros(SHAPE)}], torch.float32, equal=False)
