"""Moves of workers: whole parameters, and random ones with what torch's own copies make of them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from ranks import Memory

from rollcast.comm import Manifest, Move, Region

View = Callable[[torch.Tensor], torch.Tensor]
Key = tuple[int | None, str]

WIRE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
SHAPES = ((), (1,), (7,), (5000,), (3, 0), (1, 9), (12, 1), (13, 24), (60, 70), (5, 6, 7), (2, 1, 300))


@dataclass(frozen=True)
class Step:
    """One copy: a view of a parameter goes to a view of a target."""

    param: int
    take: View
    key: Key
    put: View


class Sink:
    """A worker's memory: targets with their initial values, and the copies that fill them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.initial: dict[Key, torch.Tensor] = {}
        self.steps: list[Step] = []

    def moves(self) -> tuple[Move, ...]:
        return tuple(self._move(step) for step in self.steps)

    def _move(self, step: Step) -> Move:
        source, (stage, target) = Region.of(_taken(self, step.param, step.take)), step.key
        return Move(step.param, source, target, Region.of(step.put(self.initial[step.key])), stage)

    def memory(self) -> Memory:
        stages = {stage: {} for stage, _ in self.initial if stage is not None}
        for (stage, target), tensor in self.initial.items():
            if stage is not None:
                stages[stage][target] = tensor
        live = {target: tensor.clone() for (stage, target), tensor in self.initial.items() if stage is None}
        return Memory(live, stages)

    def expected(self, weights: Sequence[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Return every target after a direct copy of every piece."""
        targets = {key: tensor.clone() for key, tensor in self.initial.items()}
        for step in self.steps:
            sent = weights[step.param].to(self.manifest.specs[step.param].dtype).contiguous()
            step.put(targets[step.key]).copy_(step.take(sent))
        return targets

    @property
    def wire_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (_taken(self, s.param, s.take) for s in self.steps))


def whole_moves(manifest: Manifest) -> tuple[Move, ...]:
    """Return the moves of a worker that keeps every parameter whole, under the trainer's name."""
    return tuple(
        Move(index, region, spec.name, region)
        for index, spec in enumerate(manifest.specs)
        if (region := Region.whole(spec.shape, spec.dtype)).numel
    )


def random_values(rng: random.Random, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    values = 4 * torch.randn(tuple(shape), generator=generator)
    return values > 0 if dtype is torch.bool else values.to(dtype)


def random_weights(rng: random.Random) -> dict[str, torch.Tensor]:
    """Return a trainer's tensors: every dtype, scalars, tensors without elements, some not contiguous."""
    weights: dict[str, torch.Tensor] = {}
    for index in range(rng.randint(3, 20)):
        shape = rng.choice(SHAPES)
        tensor = random_values(rng, shape, rng.choice([torch.bfloat16, *WIRE_DTYPES]))
        if rng.random() < 0.3:
            tensor = flipped(tensor.view(shape[::-1]))
        weights[f"layer.{index}"] = tensor
    weights["last"] = random_values(rng, (30, 40), torch.bfloat16)
    return weights


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view with all dimensions in reverse."""
    return tensor.permute(tuple(range(tensor.dim()))[::-1])


def random_sink(rng: random.Random, manifest: Manifest, params: Sequence[int] | None = None) -> Sink:
    """Return a worker that keeps each of `params` (default: all) in one or two targets.

    These are live or staged, of one parameter or several, contiguous or strided, of the wire dtype or another.
    """
    sink = Sink(manifest)
    pending = [
        (param, take)
        for param in (range(len(manifest.specs)) if params is None else params)
        for take in random_takes(rng, manifest.specs[param].shape)
    ]
    rng.shuffle(pending)
    while pending:
        count = rng.choice([1, 1, 3, 6])
        stage = rng.choice([None, None, 0, 1, 2])
        members, pending = pending[:count], pending[count:]
        if count == 1:
            _alone(rng, sink, stage, *members[0])
        else:
            _together(rng, sink, stage, members)
    # Workers list their moves in the order of their memory, not in the trainer's.
    sink.steps.sort(key=lambda step: list(sink.initial).index(step.key))
    return sink


def random_takes(rng: random.Random, shape: tuple[int, ...]) -> list[View]:
    """Return random views of a parameter, none of them empty."""
    if 0 in shape:
        return []
    first, last = (rng.randrange(size) for size in ((shape or (1,))[0], (shape or (1,))[-1]))
    views: list[View] = [lambda t: t, lambda t: t.expand(3, *t.shape), flipped]
    if shape:
        views += [
            lambda t: t[first:],
            lambda t: t[..., last:],
            lambda t: t[..., last : last + 1],
            lambda t: t[::2],
            lambda t: t.select(0, first),
            lambda t: t.select(-1, last),
            lambda t: t.select(-1, last)[..., None],
            lambda t: t.narrow(0, first, 1).expand(2, *t.shape[1:]),
        ]
    return rng.sample(views, rng.choice([1, 1, 2])) if rng.random() < 0.6 else views[:1]


def _taken(sink: Sink, param: int, take: View) -> torch.Tensor:
    spec = sink.manifest.specs[param]
    return take(torch.zeros(spec.shape, dtype=spec.dtype))


def _alone(rng: random.Random, sink: Sink, stage: int | None, param: int, take: View) -> None:
    """Add a target for one piece alone, which may be larger or laid out differently."""
    part = _taken(sink, param, take)
    dtype = rng.choice([part.dtype, part.dtype, torch.float32])
    layouts: list[tuple[tuple[int, ...], View]] = [(tuple(part.shape), lambda t: t)]
    if part.dim():
        *outer, last = part.shape
        layouts += [
            ((*outer, last + 3), lambda t: t[..., 1:-2]),
            ((2 * part.shape[0], *part.shape[1:]), lambda t: t[::2]),
            (tuple(reversed(part.shape)), flipped),
        ]
    shape, put = rng.choice(layouts)
    key = stage, f"t{len(sink.initial)}"
    sink.initial[key] = random_values(rng, shape, dtype)
    sink.steps.append(Step(param, take, key, put))


def _together(rng: random.Random, sink: Sink, stage: int | None, members: list[tuple[int, View]]) -> None:
    """Add one flat target per dtype, which holds the pieces one after the other, some with a gap between."""
    ends: dict[torch.dtype, int] = {}
    name, cast = f"t{len(sink.initial)}", rng.random() < 0.3
    for param, take in members:
        part = _taken(sink, param, take)
        dtype = torch.float32 if cast else part.dtype
        start = ends.get(dtype, 0) + rng.choice([0] * 5 + [5])
        ends[dtype] = start + part.numel()
        sink.steps.append(Step(param, take, (stage, f"{name}.{dtype}"), _slot(start, tuple(part.shape))))
    for dtype, end in ends.items():
        sink.initial[stage, f"{name}.{dtype}"] = random_values(rng, (end + 3,), dtype)


def _slot(start: int, shape: tuple[int, ...]) -> View:
    numel = torch.Size(shape).numel()
    return lambda t: t[start : start + numel].view(shape)


def indices(region: Region, numel: int) -> list[int]:
    """Return the indices of the elements that a region selects of a tensor of `numel` elements, in order."""
    return replace(region, dtype=torch.int64).view(torch.arange(numel)).flatten().tolist()
