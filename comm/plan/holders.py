"""Who holds what of each parameter, and who sends it: pure functions, the same on every trainer rank."""

import base64
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import prod

import torch

from rollcast.comm.plan.box import Box, Strided, cut
from rollcast.comm.plan.buckets import Move
from rollcast.comm.plan.manifest import Manifest, ParamSpec

# Replicas share a tensor out among them from this size on; smaller ones are sent by one of them.
SPLIT_BYTES = 32 << 20
# Most ranks that share out what they all hold: each is one more communicator of every worker.
MAX_REPLICAS = 8

Part = tuple[int, Box]
"""Trainer rank, and what it holds or sends of a parameter."""
Boxes = Mapping[int, Sequence[Box]]
"""What one trainer rank holds or sends, by index of the parameter in the manifest."""


@dataclass(frozen=True, slots=True)
class HeldParam:
    """One rank's statement about one parameter."""

    spec: ParamSpec
    """Of the full parameter."""
    boxes: tuple[Box, ...]
    """What the rank holds of it, in the order of its tensors."""


def statement_to_text(statement: Sequence[HeldParam]) -> str:
    """Encode what a rank holds, for a store."""
    rows = [
        [held.spec.name, held.spec.shape, str(held.spec.dtype).removeprefix("torch."), *map(_row, held.boxes)]
        for held in statement
    ]
    return base64.b64encode(zlib.compress(json.dumps(rows).encode())).decode()


def statement_from_text(text: str) -> list[HeldParam]:
    """Decode what `statement_to_text` encoded."""
    return [
        HeldParam(
            ParamSpec(name, tuple(shape), getattr(torch, dtype)),
            tuple(Box(*map(tuple, row)) if row else Box.whole(shape) for row in boxes),
        )
        for name, shape, dtype, *boxes in json.loads(zlib.decompress(base64.b64decode(text)))
    ]


def _row(box: Box) -> tuple[tuple[int, ...], ...]:
    """Return the box as numbers; nothing for a whole parameter."""
    return () if box.extent == box.shape else (box.shape, box.start, box.stop)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Elements of a parameter that are in several tensors, of one trainer rank or of several."""

    param: int
    """Index of the parameter in the manifest."""
    box: Box


@dataclass(frozen=True)
class Holders:
    """Every parameter that any trainer rank holds a part of, and who holds which part."""

    manifest: Manifest
    parts: tuple[tuple[Part, ...], ...]
    """By parameter."""

    @classmethod
    def of(cls, statements: Sequence[Sequence[HeldParam]]) -> "Holders":
        """Merge the statements of all ranks, in rank order.

        Raises `ValueError` naming a parameter of which ranks state different shapes or dtypes, or of which nobody
        holds some elements.
        """
        specs: dict[str, tuple[int, ParamSpec]] = {}
        parts: dict[str, list[Part]] = {}
        for rank, statement in enumerate(statements):
            for held in statement:
                _check_shape(held, rank)
                first, spec = specs.setdefault(held.spec.name, (rank, held.spec))
                if held.spec != spec:
                    raise ValueError(
                        f"trainer ranks {first} and {rank} disagree about parameter {spec.name}: {spec} against "
                        f"{held.spec}"
                    )
                # What is whole is whole with any shape.
                boxes = [Box.whole(spec.shape) if box.numel == spec.numel else box for box in held.boxes if box.numel]
                parts.setdefault(spec.name, []).extend((rank, box) for box in boxes)
        if not specs:
            raise ValueError("no trainer rank has any parameter to send")
        holders = cls(Manifest(tuple(spec for _, spec in specs.values())), tuple(map(tuple, parts.values())))
        for spec, of_param in zip(holders.manifest.specs, holders.parts, strict=True):
            _check_complete(spec, of_param)
        return holders

    @classmethod
    def replicated(cls, manifest: Manifest, ranks: int) -> "Holders":
        """Return the holders of trainers that each have everything."""
        return cls.of([[HeldParam(spec, (Box.whole(spec.shape),)) for spec in manifest.specs]] * ranks)

    def shares(self, *, preferred: int | None = None) -> "dict[int, dict[int, list[Box]]]":
        """Return what each trainer rank sends, by rank and parameter: every element once.

        Ranks that hold the same share it out; `preferred` sends all that it holds.
        """
        load: dict[int, int] = {}
        shares: dict[int, dict[int, list[Box]]] = {}
        for param, (spec, parts) in enumerate(zip(self.manifest.specs, self.parts, strict=True)):
            for box, ranks in _disjoint(parts):
                if preferred in ranks:
                    ranks = [preferred]
                for rank, part in _shared_out(box, ranks[:MAX_REPLICAS], load, itemsize=spec.dtype.itemsize):
                    load[rank] = load.get(rank, 0) + part.numel * spec.dtype.itemsize
                    shares.setdefault(rank, {}).setdefault(param, []).append(part)
        return dict(sorted(shares.items()))

    def overlaps(self) -> list[Overlap]:
        """Return all that is held more than once: these tensors must be equal."""
        return [
            Overlap(param, box)
            for param, (spec, parts) in enumerate(zip(self.manifest.specs, self.parts, strict=True))
            if sum(box.numel for _, box in parts) > spec.numel
            for box in _held_twice([box for _, box in parts])
        ]


def cut_moves(moves: Iterable[Move], boxes: Boxes) -> list[Move]:
    """Return the parts of a worker's moves whose source elements are in these boxes, in the moves' order."""
    parts: list[Move] = []
    for move in moves:
        for box in boxes.get(move.param, ()):
            if box.extent == box.shape:
                parts.append(move)
                continue
            for part in cut(Strided.of(move.source, move.region), box):
                source, region = part.regions(move.source, move.region)
                parts.append(replace(move, source=source, region=region))
    return parts


def _disjoint(parts: Sequence[Part]) -> list[tuple[Box, list[int]]]:
    """Return disjoint boxes of all elements that are held, and the ranks that hold each."""
    holders: dict[Box, list[int]] = {}
    for rank, box in parts:
        ranks = holders.setdefault(box, [])
        if rank not in ranks:
            ranks.append(rank)
    if _side_by_side(list(holders)):
        return list(holders.items())
    disjoint: list[tuple[Box, list[int]]] = []
    for box, ranks in holders.items():
        rest = [box]
        for earlier, _ in disjoint:
            rest = [piece for part in rest for piece in part.minus(earlier)]
        disjoint += [(piece, ranks) for piece in rest]
    return disjoint


def _held_twice(boxes: Sequence[Box]) -> list[Box]:
    """Return boxes of all elements that are in several of the boxes; a box may occur twice."""
    counts = Counter(boxes)
    twice = [box for box, count in counts.items() if count > 1]
    if not _side_by_side(list(counts)):
        twice += filter(None, (one.common(other) for one, other in combinations(counts, 2)))
    return [*dict.fromkeys(twice)]


def _side_by_side(boxes: Sequence[Box]) -> bool:
    """Return whether boxes differ in one dimension only, and do not overlap there: each needs no look at all others."""
    dims = {
        dim
        for dim in range(len(boxes[0].shape) if boxes else 0)
        if len({(box.start[dim], box.stop[dim]) for box in boxes}) > 1
    }
    if len(dims) != 1 or len({box.shape for box in boxes}) > 1:
        return len(boxes) < 2
    (dim,) = dims
    ranges = sorted((box.start[dim], box.stop[dim]) for box in boxes)
    return all(stop <= start for (_, stop), (start, _) in pairwise(ranges))


def _shared_out(box: Box, ranks: Sequence[int], load: Mapping[int, int], *, itemsize: int) -> list[Part]:
    """Share a box out among ranks that hold all of it."""
    if len(ranks) > 1 and box.numel * itemsize >= SPLIT_BYTES:
        dim = max(range(len(box.shape)), key=lambda dim: box.extent[dim] >= len(ranks))
        return [(rank, part) for rank, part in zip(ranks, _split(box, dim, len(ranks)), strict=False) if part.numel]
    return [(min(ranks, key=lambda rank: load.get(rank, 0)), box)]


def _split(box: Box, dim: int, count: int) -> list[Box]:
    """Return `count` slices of the box along one dimension, as even as they can be."""
    extent, first = box.extent[dim], box.start[dim]
    ends = [first + extent * index // count for index in range(count + 1)]
    return [
        Box(box.shape, (*box.start[:dim], low, *box.start[dim + 1 :]), (*box.stop[:dim], high, *box.stop[dim + 1 :]))
        for low, high in pairwise(ends)
    ]


def _check_shape(held: HeldParam, rank: int) -> None:
    for box in held.boxes:
        if prod(box.shape) != held.spec.numel:
            raise ValueError(
                f"{box} on trainer rank {rank} cannot be a part of parameter {held.spec}: that has {held.spec.numel} "
                "elements"
            )


def _check_complete(spec: ParamSpec, parts: Sequence[Part]) -> None:
    shapes = {box.shape: rank for rank, box in reversed(parts)}
    if len(shapes) > 1:
        each = [f"{list(shape)} (rank {rank})" for shape, rank in sorted(shapes.items())]
        raise ValueError(
            f"trainer ranks state what they hold of parameter {spec} with different shapes: {' and '.join(each)}"
        )
    disjoint = _disjoint(parts)
    if sum(box.numel for box, _ in disjoint) == spec.numel:
        return
    missing = [Box.whole(next(iter(shapes), spec.shape))]
    for box, _ in disjoint:
        missing = [piece for part in missing for piece in part.minus(box)]
    raise ValueError(f"no trainer rank holds {missing[0]} of parameter {spec}")
