"""Sets of elements and descriptions of faulty writes, against masks made element by element."""

import random

import pytest
import torch

from rollcast.comm import Region
from rollcast.rollout.landing.coverage import ElementSet, coverage

SIZE = 60
WHOLE = Region.whole((SIZE,), torch.float32)


def random_region(rng: random.Random) -> Region:
    """Return a region of a tensor of `SIZE` elements: any view, or a window with strides of its own."""
    shape = rng.choice([(60,), (6, 10), (3, 4, 5), (2, 5, 6), (1, 60), (5, 1, 12)])
    view = torch.empty(SIZE, device="meta").view(shape)
    for _ in range(rng.randint(0, 4)):
        dim = rng.randrange(view.dim())
        size = view.shape[dim]
        if rng.random() < 0.3:
            view = view.transpose(dim, rng.randrange(view.dim()))
        elif rng.random() < 0.3:
            view = view[(slice(None),) * dim + (slice(rng.randint(0, size), None, rng.randint(1, 3)),)]
        else:
            start = rng.randint(0, size)
            view = view.narrow(dim, start, rng.randint(0, size - start))
    if rng.random() < 0.1:
        view = view.expand(2, *view.shape)
    return Region.of(view)


def counts(*regions: Region) -> torch.Tensor:
    """Count how often the regions have each element."""
    flat = torch.arange(SIZE)
    numbers = [flat.as_strided(region.shape, region.stride, region.offset).flatten() for region in regions]
    return torch.bincount(torch.cat([torch.empty(0, dtype=torch.int64), *numbers]), minlength=SIZE)


def test_elements_are_a_set() -> None:
    for seed in range(300):
        check_set(random.Random(seed))


def check_set(rng: random.Random) -> None:
    have, elements = [], ElementSet()
    for _ in range(rng.randint(0, 6)):
        part = random_region(rng)
        owned, asked = counts(*have) > 0, counts(part) > 0
        assert elements.covers(part) == bool((owned | ~asked).all())
        assert elements.overlaps(part) == bool((owned & asked).any())
        elements.add(part)
        have.append(part)


def test_every_element_is_written_once_or_the_fault_is_described() -> None:
    for seed in range(300):
        check_coverage(random.Random(seed))


def check_coverage(rng: random.Random) -> None:
    cuts = sorted(rng.sample(range(1, SIZE), rng.randint(0, 4)))
    parts = [WHOLE.rows(start, end - start) for start, end in zip([0, *cuts], [*cuts, SIZE], strict=True)]
    kinds = [rng.choice("lllf-") for _ in parts]
    loads = [part for part, kind in zip(parts, kinds, strict=True) if kind == "l"]
    fills = [part for part, kind in zip(parts, kinds, strict=True) if kind == "f"]
    loads += [random_region(rng)] if rng.random() < 0.3 else []
    fills += [random_region(rng)] if rng.random() < 0.3 else []
    rng.shuffle(loads)
    problem = coverage(WHOLE, loads, fills) or ""
    twice, missing = bool((counts(*loads) > 1).any()), int((counts(*loads, *fills) == 0).sum())
    assert ("twice" in problem) == twice
    assert twice or not missing or problem.startswith(f"{missing} of {SIZE} elements")
    assert bool(problem) == (twice or missing > 0)


def test_the_first_elements_that_are_written_twice_are_named() -> None:
    problem = coverage(WHOLE, [WHOLE.rows(0, 30), WHOLE.rows(20, 40)], [])
    assert problem == "the loader writes elements 20 to 30 twice"


def test_writes_outside_are_named() -> None:
    for outside in (WHOLE.rows(0, 12), WHOLE.rows(5, 10), WHOLE.rows(20, 2)):
        assert coverage(WHOLE.rows(0, 10), [outside], []) == "the loader writes outside of it"


def test_a_tensor_with_gaps_is_whole_without_them() -> None:
    gaps = Region((3, 4), (20, 1), 0, torch.float32)
    assert coverage(gaps, [gaps], []) is None
    assert coverage(gaps, [gaps.rows(0, 2)], []) == (
        "4 of 12 elements would not be written: the trainer does not send what they need, nor says by keep= of "
        "job.broadcaster() that the engine keeps what it has"
    )


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_is_covered_by_nothing(shape: tuple[int, ...]) -> None:
    empty = Region.whole(shape, torch.float32)
    assert coverage(empty, [], []) is None and coverage(empty, [empty], []) is None
    assert ElementSet().covers(empty) and not ElementSet().overlaps(empty)


def test_a_million_rows_take_no_time_for_each() -> None:
    """Experts are loaded in parts: the parts that adjoin are one."""
    elements, rows = ElementSet(), Region.whole((20_000, 50), torch.float32)
    for start in range(0, 20_000, 4):
        part = rows.rows(start, 4)
        assert not elements.overlaps(part)
        elements.add(part)
    assert elements.covers(rows)
