"""Copies cut along what trainer ranks hold: every element once, from the right place of the rank's own tensor."""

import random
from math import prod

import pytest
import torch
from shards import indices

from rollcast.comm.plan.box import Box, Strided, cut, localize
from rollcast.comm.plan.region import Region

SEEDS = range(400)


def random_shape(chance: random.Random) -> list[int]:
    return [chance.choice([1, 2, 3, 4, 6, 8, 12]) for _ in range(chance.randint(1, 3))]


def random_view(shape: list[int], chance: random.Random) -> list[int]:
    """The same elements with another shape: dimensions merged, or split in two."""
    kind = chance.choice(["same", "flat", "merged", "split"])
    if kind == "flat":
        return [prod(shape)]
    if kind == "merged" and len(shape) > 1:
        return [shape[0] * shape[1], *shape[2:]]
    if kind == "split":
        dim = chance.randrange(len(shape))
        factor = chance.choice([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0])
        return [*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :]]
    return shape


def random_part(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """A strided view of some elements."""
    for _ in range(chance.randint(0, 3)):
        dim = chance.randrange(tensor.dim())
        kind = chance.choice(["narrow", "step", "permute", "unflatten", "select", "flatten"])
        size = tensor.shape[dim]
        if kind == "narrow":
            start = chance.randrange(size)
            tensor = tensor.narrow(dim, start, chance.randint(1, size - start))
        elif kind == "step":
            tensor = tensor[(*[slice(None)] * dim, slice(chance.randrange(size), None, chance.randint(1, 3)))]
        elif kind == "permute":
            tensor = tensor.permute(*chance.sample(range(tensor.dim()), tensor.dim()))
        elif kind == "unflatten":
            factor = chance.choice([n for n in range(1, size + 1) if size % n == 0])
            tensor = tensor.unflatten(dim, (factor, size // factor))
        elif kind == "select" and tensor.dim() > 1:
            tensor = tensor.select(dim, chance.randrange(size))
        elif kind == "flatten" and tensor.is_contiguous():
            tensor = tensor.flatten()
    return tensor


def random_box(shape: list[int], chance: random.Random) -> Box:
    start = [chance.randrange(size) if chance.random() < 0.7 else 0 for size in shape]
    stop = [
        chance.randint(first, size) if chance.random() < 0.7 else size for first, size in zip(start, shape, strict=True)
    ]
    return Box(tuple(shape), tuple(start), tuple(stop))


def random_case(seed: int) -> tuple[random.Random, torch.Tensor, torch.Tensor, Box]:
    """A full tensor, a part of it that a worker keeps, and a box that a rank holds."""
    chance = random.Random(seed)
    shape = random_shape(chance)
    full = torch.arange(prod(shape)).view(shape)
    source = random_part(full, chance)
    return chance, full, source, random_box(random_view(shape, chance), chance)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_are_the_elements_inside_the_box_each_once(seed: int) -> None:
    _, full, source, box = random_case(seed)
    inside = torch.zeros(box.shape, dtype=torch.bool)
    inside[indices(box)] = True
    target = torch.full(source.shape, -1)
    writes = torch.zeros(source.shape, dtype=torch.int)
    parts = cut(Strided.of(Region.of(source), Region.of(target)), box)
    for part in parts:
        read, write = part.regions(Region.of(source), Region.of(target))
        write.view(target).copy_(read.view(full))
        Region(write.shape, write.stride, write.offset, torch.int32).view(writes).add_(1)
    expected = inside.view(-1)[source]
    assert torch.equal(writes, expected.int())
    assert torch.equal(target, torch.where(expected, source, -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_local_parts_read_the_same_elements_from_the_ranks_own_tensor(seed: int) -> None:
    chance, full, source, box = random_case(seed)
    held = full.view(box.shape)[indices(box)]
    # Any strides: contiguous, transposed, or a part of a larger tensor.
    order = chance.sample(range(held.dim()), held.dim())
    padded = torch.full([size + chance.choice([0, 0, 2]) for size in (held.shape[dim] for dim in order)], -7)
    own = padded[tuple(slice(held.shape[dim]) for dim in order)].permute([order.index(d) for d in range(held.dim())])
    own.copy_(held)
    for part in cut(Strided.of(Region.of(source), Region.of(source)), box):
        region, _ = part.regions(Region.of(source), Region.of(source))
        wire = torch.full(region.shape, -1)
        for local, place in localize(region, box, own.stride()):
            place.view(wire).copy_(local.view(own))
        assert torch.equal(wire, region.view(full))


def test_rows_stay_one_part_and_contiguous() -> None:
    """The everyday case: a rank's rows of a weight, of which a worker keeps a range of rows."""
    full = Region.whole((12, 5), torch.bfloat16)
    box = Box((12, 5), (4, 0), (8, 5))
    (part,) = cut(Strided.of(full.rows(2, 5), full.rows(2, 5)), box)
    source, target = part.regions(full, full)
    assert source == target == full.rows(4, 3)
    ((local, wire),) = localize(source, box, (5, 1))
    assert local == Region((3, 5), (5, 1), 0, torch.bfloat16) == wire


def test_a_range_of_the_flattened_tensor_has_at_most_three_parts() -> None:
    full = Region.whole((100, 7), torch.float32)
    parts = cut(Strided.of(full, full), Box((700,), (3,), (600,)))
    assert [prod(size for size, _, _ in part.dims) for part in parts] == [4, 84 * 7, 5]


def test_interleaved_heads_are_one_strided_part() -> None:
    """Megatron's fused QKV: each group has its query heads, one key head and one value head."""
    groups, queries, head, hidden = 4, 2, 3, 8
    weight = Region.whole((groups * queries * head, hidden), torch.float32)
    box = Box((groups, queries, head, hidden), (1, 0, 0, 0), (3, queries, head, hidden))
    (part,) = cut(Strided.of(weight, weight), box)
    source, _ = part.regions(weight, weight)
    fused = torch.zeros(2, queries + 2, head, hidden)
    ((local, _),) = localize(source, box, fused[:, :queries].stride())
    assert local == Region((2, 6, 8), ((queries + 2) * head * hidden, hidden, 1), 0, torch.float32)


@pytest.mark.parametrize("seed", range(200))
def test_what_is_left_of_a_box_is_disjoint_and_complete(seed: int) -> None:
    chance = random.Random(seed)
    shape = random_shape(chance)
    one, other = random_box(shape, chance), random_box(shape, chance)
    marks = torch.zeros(shape, dtype=torch.int)
    for part in one.minus(other):
        marks[indices(part)] += 1
    expected = torch.zeros(shape, dtype=torch.int)
    expected[indices(one)] = 1
    expected[indices(other)] = 0
    assert torch.equal(marks, expected)


@pytest.mark.parametrize(
    ("shape", "start", "stop"), [((4,), (0, 0), (4, 4)), ((4,), (2,), (1,)), ((4,), (0,), (5,)), ((4,), (-1,), (2,))]
)
def test_what_is_no_part_of_the_shape_is_refused(
    shape: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"not a part of|differ in length"):
        Box(shape, start, stop)
