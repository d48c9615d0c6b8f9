"""How the recorder resolves views, copies and buffers, against torch itself."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from oddloaders import Tensors, Toy, both, changed, each, land

from rollcast.comm import Manifest, ParamSpec, Region
from rollcast.rollout.errors import LandingError
from rollcast.rollout.landing.compiler import record
from rollcast.rollout.landing.recorder import region_before_copy
from rollcast.rollout.landing.tape import Op, Ref, replay

SHAPES = ((24,), (4, 6), (2, 3, 4), (1, 6, 4), (5, 1), (2, 2, 3, 2), (0, 3), ())
View = Callable[[torch.Tensor], torch.Tensor]


def random_view(rng: random.Random, tensor: torch.Tensor) -> View:
    """A view that the tensor allows."""
    if not tensor.dim():
        return lambda t: t.unsqueeze(0)
    dim, other = rng.randrange(tensor.dim()), rng.randrange(tensor.dim())
    size = tensor.shape[dim]
    start = rng.randint(0, size)
    length, step = rng.randint(0, size - start), rng.randint(1, 3)
    order = rng.sample(range(tensor.dim()), tensor.dim())
    part = (slice(None),) * dim + (slice(rng.randint(0, size // 2), None, step),)
    views: list[View] = [
        lambda t: t.narrow(dim, start, length) if length else t.narrow(dim, 0, size),
        lambda t: t.transpose(dim, other),
        lambda t: t.permute(order),
        lambda t: t[part],
        lambda t: t.unsqueeze(dim),
        lambda t: t.squeeze(dim),
        lambda t: t.flatten(dim) if t.is_contiguous() else t,
        lambda t: t.select(dim, size // 2) if size else t,
        lambda t: t.movedim(dim, 0),
    ]
    return rng.choice(views)


def random_chain(rng: random.Random, tensor: torch.Tensor, steps: int, *, only_views: bool) -> list[View]:
    """Views, and between them copies and reshapes."""
    copies: list[View] = [torch.clone, lambda t: t.contiguous(), lambda t: t.reshape(-1), lambda t: t.to("cpu").clone()]
    computed: list[View] = [lambda t: t + 1, lambda t: t.flip(0) if t.dim() else -t, lambda t: t.clone().mul_(2)]
    chain: list[View] = []
    for _ in range(steps):
        kind = 0.0 if only_views else rng.random()
        view = random_view(rng, tensor) if kind < 0.6 else rng.choice(copies if kind < 0.85 else computed)
        tensor = view(tensor)
        chain.append(view)
    return chain


def through(chain: list[View], tensor: torch.Tensor) -> torch.Tensor:
    for view in chain:
        tensor = view(tensor)
    return tensor


@pytest.mark.parametrize("batch", range(20))
def test_random_chains_land_as_they_load(batch: int) -> None:
    """A chain of views, copies and sums of a source goes to a random part of a parameter."""
    for seed in range(batch * 20, batch * 20 + 20):
        check_chain(random.Random(seed), seed)


def check_chain(rng: random.Random, seed: int) -> None:
    take = random_chain(rng, torch.empty(shape := rng.choice(SHAPES)), rng.randint(0, 6), only_views=False)
    piece = through(take, torch.zeros(shape))
    space = torch.empty([size + rng.randint(0, 2) for size in piece.shape])
    lowest = [rng.randint(0, had - size) for had, size in zip(space.shape, piece.shape, strict=True)]
    part = tuple(slice(start, start + size) for start, size in zip(lowest, piece.shape, strict=True))
    turn = rng.sample(range(space.dim()), space.dim())

    def step(parameter: torch.Tensor, weight: torch.Tensor) -> None:
        parameter.zero_()
        back = sorted(range(len(turn)), key=lambda dim: turn[dim])
        parameter.permute(back)[part].copy_(through(take, weight))

    toy = Toy(both(step), {"a": shape}, {"a": tuple(space.permute(turn).shape)})
    plan = toy.compile()
    assert plan.check() == []
    live, weights = toy.parameters(), toy.weights(seed=seed)
    land(plan, live, list(weights.values()))
    assert changed(live, toy.native(seed=seed)) == [] and changed(weights, toy.weights(seed=seed)) == []


def test_a_part_of_a_copy_is_a_part_of_the_original() -> None:
    parts = [check_part(random.Random(seed)) for seed in range(1000)]
    assert sum(parts) > 700, "most parts are found"


def check_part(rng: random.Random) -> bool:
    flat = torch.arange(24 * 24)
    original = flat.view(rng.choice([(24, 24), (4, 6, 24), (576,), (2, 12, 3, 8)]))
    original = through(random_chain(rng, original, rng.randint(0, 4), only_views=True), original)
    copy = original.clone() if rng.random() < 0.5 else original.clone(memory_format=torch.contiguous_format)
    part = through(random_chain(rng, copy, rng.randint(0, 5), only_views=True), copy)
    region = region_before_copy(Region.of(original), Region.of(copy), Region.of(part))
    assert region is None or torch.equal(region.view(flat), part)
    return region is not None


def test_a_row_of_a_transposed_copy_is_a_column() -> None:
    original, copy = Region((4, 3), (1, 4), 5, torch.int8), Region.whole((4, 3), torch.int8)
    assert region_before_copy(original, copy, copy.rows(2, 1)) == Region((1, 3), (0, 4), 7, torch.int8)


def test_elements_that_a_copy_puts_side_by_side_are_no_part_of_the_original() -> None:
    """Row ends and row starts of a transposed original are far apart."""
    original, copy = Region((4, 3), (1, 4), 0, torch.int8), Region.whole((4, 3), torch.int8)
    assert region_before_copy(original, copy, Region((4,), (1,), 1, torch.int8)) is None


def test_elements_around_the_end_of_a_copied_row_are_no_part_of_the_original() -> None:
    original, copy = Region((2, 3), (1, 2), 0, torch.int8), Region.whole((2, 3), torch.int8)
    assert region_before_copy(original, copy, Region((2,), (2,), 1, torch.int8)) is None
    assert region_before_copy(original, copy, Region((2,), (2,), 0, torch.int8)) == Region((2,), (4,), 0, torch.int8)


WIDTHS = {
    (torch.float8_e4m3fn, torch.bfloat16): True,
    (torch.float8_e5m2, torch.float16): True,
    (torch.float8_e8m0fnu, torch.float16): False,
    (torch.bfloat16, torch.float32): True,
    (torch.float16, torch.bfloat16): False,
    (torch.bfloat16, torch.float16): False,
    (torch.float32, torch.float64): True,
    (torch.float32, torch.bfloat16): False,
}


@pytest.mark.parametrize(("wire", "between"), WIDTHS)
def test_reading_through_a_cast_that_loses_nothing(wire: torch.dtype, between: torch.dtype) -> None:
    toy = Toy(each(lambda w: w.to(between)), {"a": (50, 40)}, {"a": (50, 40)}, wire, torch.float32)
    plan = toy.compile()
    assert (plan.stages == ()) == WIDTHS[wire, between]
    live = toy.parameters()
    land(plan, live, list(toy.weights(seed=1).values()))
    assert changed(live, toy.native(seed=1)) == []


def test_every_value_of_a_narrow_dtype_passes_a_wide_one() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for narrow in (torch.bfloat16, torch.float16):
        values = bits.view(narrow)
        values = values[~values.isnan()]
        assert torch.equal(values.float().to(narrow).view(torch.int16), values.view(torch.int16))


def recorded(step: Callable[[torch.Tensor, torch.Tensor], object]) -> list[str]:
    """Return the operations that are recorded of a loader of one parameter."""
    target = torch.empty(4, 4, device="meta")

    def load(pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _, weight in pairs:
            step(target, weight)

    recording = record(load, {"p": target}, Manifest((ParamSpec("p", (4, 4), torch.float32),)))
    return [op.func.split(".")[1] for op in recording.ops]


def test_views_and_shape_queries_are_not_recorded() -> None:
    assert recorded(lambda p, w: (w.t()[1:].unsqueeze(0), w.is_contiguous(), w.size(), p.data.chunk(2))) == []


def test_what_the_loader_does_with_its_own_tensors_is_its_own_business() -> None:
    assert recorded(lambda p, w: torch.ones(3).add_(1).sum().item()) == []


def test_values_are_those_of_the_moment() -> None:
    """A constant that the loader changes afterwards, and one whose memory is used again."""

    def step(parameter: torch.Tensor, weight: torch.Tensor) -> None:
        for row in range(4):
            constant = torch.full((4,), float(row))
            parameter[row].copy_(constant)
            constant.mul_(100)

    toy = Toy(both(step), {"a": (4, 4)}, {"a": (4, 4)})
    live: Tensors = toy.parameters()
    land(toy.compile(), live, list(toy.weights(seed=1).values()))
    assert changed(live, toy.native(seed=1)) == []


def test_memory_that_is_free_again_is_not_taken_for_a_weight() -> None:
    """A weight that gets other data lets go of its memory; the next tensor may get that."""

    def step(parameter: torch.Tensor, weight: torch.Tensor) -> None:
        parameter.copy_(weight)
        weight.data = torch.empty(0, device="meta")
        for size in (4, 8, 16) * 50:
            torch.ones(size, size).add_(1)

    assert recorded(step)[0] == "copy_" and len(recorded(step)) == 2


@pytest.mark.parametrize("step", [lambda p, w: p.t_(), lambda p, w: p.resize_(8, 8), lambda p, w: w.resize_(8, 8)])
def test_another_shape_or_memory_in_place_is_refused(step: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    with pytest.raises(LandingError, match=r"parameter p .*in place"):
        recorded(step)


def test_buffers_are_made_where_the_weights_are() -> None:
    tensors: dict[tuple[str, int | str], torch.Tensor] = {("live", "p"): torch.empty(3, device="meta")}
    result = Ref("temp", 1, Region.whole((3,), torch.float32))
    replay((Op("aten.zeros.default", ([3],), {}, (result,)),), tensors)
    assert tensors["temp", 1].is_meta


def test_a_result_of_another_shape_is_refused() -> None:
    result = Ref("temp", 1, Region.whole((4,), torch.float32))
    with pytest.raises(LandingError, match=r"expected \[4\] torch.float32, got \[3\]"):
        replay((Op("aten.zeros.default", ([3],), {}, (result,)),), {("live", "p"): torch.empty(3)})


def test_a_loader_that_fails_is_quoted() -> None:
    def step(parameter: torch.Tensor, weight: torch.Tensor) -> None:
        assert parameter.shape == (3, 3), f"expected 3x3, got {list(weight.shape)}"

    with pytest.raises(LandingError, match=r"parameter p \[4, 4\] float32: expected 3x3, got \[4, 4\]"):
        recorded(step)
    with pytest.raises(LandingError, match=r"parameter p .*: a check of its name, .*the engine.s p is"):
        recorded(lambda p, w: (_ for _ in ()).throw(NotImplementedError()))
