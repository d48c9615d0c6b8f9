"""Weights cut at random into what several trainer ranks hold of them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from rollcast.comm import Box, Holding, WeightSource

Rank = dict[str, tuple[Holding, ...]]


@dataclass
class Shards:
    """What each rank holds, and how copies follow the full weights."""

    held: list[Rank]
    copies: list[Callable[[], object]] = field(default_factory=list)

    def refresh(self) -> None:
        """Give the ranks' own copies the values of the full weights."""
        for copy in self.copies:
            copy()


def random_shards(rng: random.Random, weights: dict[str, torch.Tensor], ranks: int) -> Shards:
    """Cut every weight into boxes, and give each box to one rank or to two."""
    shards = Shards([{} for _ in range(ranks)])
    for name, tensor in weights.items():
        view = rng.choice([list(tensor.shape), [tensor.numel()], _split_in_two(rng, list(tensor.shape))])
        for box in _random_boxes(rng, Box.whole(view)):
            for rank in rng.sample(range(ranks), rng.choice([1, 1, 2])):
                holding = _holding(rng, shards, tensor, view, box)
                shards.held[rank][name] = (*shards.held[rank].get(name, ()), holding)
    return shards


def indices(box: Box) -> tuple[slice, ...]:
    """What selects the box in a tensor of its shape."""
    return tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))


def put_together(sources: Sequence[WeightSource], *, into: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The full tensors, made of what all ranks hold (added to `into`); elements that nobody holds are NaN."""
    full = {} if into is None else into
    for source in sources:
        for param, parts in source.gather(range(len(source.manifest.specs))):
            held = source.statement[param]
            value = float("nan") if held.spec.dtype.is_floating_point else 0
            whole = full.setdefault(held.spec.name, torch.full(held.spec.shape, value, dtype=held.spec.dtype))
            for box, part in zip(held.boxes, parts, strict=True):
                whole.view(box.shape)[indices(box)].copy_(part)
    return full


def _holding(rng: random.Random, shards: Shards, full: torch.Tensor, view: list[int], box: Box) -> Holding:
    where = indices(box)
    if rng.random() < 0.5 and full.is_contiguous():
        return Holding(full.view(view)[where], full.shape, box.start, view)
    # A copy of its own, in a larger tensor or with other strides.
    wide = torch.empty([size + rng.choice([0, 1]) for size in box.extent], dtype=full.dtype)
    own = wide[tuple(slice(size) for size in box.extent)]

    def copy() -> None:
        own.copy_(full.reshape(view)[where])

    copy()
    shards.copies.append(copy)
    return Holding(own, full.shape, box.start, view)


def _random_boxes(rng: random.Random, whole: Box) -> list[Box]:
    boxes = [whole]
    for _ in range(rng.randint(0, 3)):
        box = boxes.pop(rng.randrange(len(boxes)))
        dims = [dim for dim, size in enumerate(box.extent) if size > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = rng.choice(dims)
        at = rng.randint(box.start[dim] + 1, box.stop[dim] - 1)
        boxes.append(Box(box.shape, box.start, (*box.stop[:dim], at, *box.stop[dim + 1 :])))
        boxes.append(Box(box.shape, (*box.start[:dim], at, *box.start[dim + 1 :]), box.stop))
    return boxes


def _split_in_two(rng: random.Random, shape: list[int]) -> list[int]:
    if not shape or not prod(shape):
        return shape
    dim = rng.randrange(len(shape))
    factor = rng.choice([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0])
    return [*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :]]
