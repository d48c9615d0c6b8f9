"""What travels on which lane, and in which order: frozen data and pure functions, the same on both sides.

Each worker lists where each piece of each parameter lands in it (`Move`), and each trainer rank states what it holds of
each parameter (`Holders`). Workers with equal moves share lanes, one from every trainer rank that sends them anything.
A lane's moves, cut along what its sender sends, in the order of the workers' memory, become messages, and messages
become buckets; a bucket is one grouped collective.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from rollcast.comm.device.storage import ALIGN_BYTES
from rollcast.comm.plan.buckets import Bucket, Message, Move, fill_buckets
from rollcast.comm.plan.holders import Boxes, Holders, cut_moves
from rollcast.comm.plan.manifest import Manifest, ParamSpec


@dataclass(frozen=True)
class Lane:
    """One sending trainer rank and all workers that receive exactly the same bytes from it."""

    index: int
    sender: int
    """Trainer rank."""
    workers: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    boxes: Boxes | None = field(default=None, repr=False)
    """What the sender sends of each parameter. None: everything."""
    bucket_bytes: int = field(default=0, repr=False)
    """Most bytes of a bucket."""

    @classmethod
    def build(
        cls,
        moves: Sequence[Move],
        order: Sequence[int],
        *,
        index: int,
        sender: int,
        workers: Sequence[int] = (),
        boxes: Boxes | None,
        bucket_bytes: int,
    ) -> "Lane":
        """Return the lane that carries the `boxes` of a worker's moves, parameter by parameter in this order."""
        own = moves if boxes is None else cut_moves(moves, boxes)
        buckets = fill_buckets(own, order, bucket_bytes=bucket_bytes)
        return cls(index, sender, tuple(workers), buckets, boxes, bucket_bytes)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of every message of every bucket."""
        state = hashlib.sha256()
        for bucket in self.buckets:
            state.update(repr(bucket).encode())
        return state.hexdigest()

    @cached_property
    def nbytes(self) -> int:
        """Bytes that each worker of the lane receives in a sync."""
        return sum(message.nbytes for bucket in self.buckets for message in bucket.messages)

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        return tuple(message for bucket in self.buckets for message in bucket.messages)


@dataclass(frozen=True)
class TransferPlan:
    """Every lane of a sync. All trainer ranks hold equal plans; a worker holds its own lanes only."""

    manifest: Manifest
    """The trainer's parameters, in the dtypes in which they travel; where workers differ, in the widest."""
    order: tuple[int, ...]
    """Parameters (indices into the manifest) in the order in which they are sent."""
    lanes: tuple[Lane, ...]

    @property
    def skipped(self) -> list[ParamSpec]:
        """Parameters that no worker has a place for, which are not sent."""
        sent = set(self.order)
        return [spec for param, spec in enumerate(self.manifest.specs) if param not in sent and spec.numel]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the whole plan: equal digests mean equal plans."""
        lanes = [(lane.index, lane.sender, lane.workers, lane.digest) for lane in self.lanes]
        return hashlib.sha256(repr((self.manifest.digest, self.order, lanes)).encode()).hexdigest()

    def lanes_of(self, worker: int) -> tuple[Lane, ...]:
        """Return the lanes on which a worker receives. Workers are numbered over all engines."""
        return tuple(lane for lane in self.lanes if worker in lane.workers)


def digest_of(lanes: Iterable[Lane]) -> str:
    """Return the hexadecimal SHA-256 of some lanes: equal digests mean equal lanes."""
    return hashlib.sha256(repr([(lane.index, lane.sender, lane.digest) for lane in lanes]).encode()).hexdigest()


def build_transfer(
    holders: Holders,
    landings: Mapping[str, Sequence[Move]],
    workers: Sequence[str],
    *,
    bucket_bytes: int,
    paired: bool = False,
) -> TransferPlan:
    """Plan the sync of what trainer ranks hold into workers, of which worker `i` keeps `landings[workers[i]]`.

    Deterministic, without communication. `landings` maps a digest to moves in the order of the worker's memory. With
    `paired`, each worker has lanes of its own, and the trainer rank of its number sends it all that it holds. What no
    worker has a place for is not sent.
    """
    manifest = wire_manifest(holders.manifest, landings.values())
    holders = replace(holders, manifest=manifest)
    order = memory_order(landings.values())
    lanes: list[Lane] = []
    for digest, receivers, shares in _receivers(holders, landings, workers, paired=paired):
        parts = (box for boxes in shares.values() for of_param in boxes.values() for box in of_param)
        everything = len(shares) == 1 and all(box.extent == box.shape for box in parts)
        for sender, boxes in shares.items():
            lane = Lane.build(
                landings[digest],
                order,
                index=len(lanes),
                sender=sender,
                workers=receivers,
                boxes=None if everything else boxes,
                # A worker has buffers for every lane.
                bucket_bytes=max(bucket_bytes // len(shares), min(bucket_bytes, ALIGN_BYTES)),
            )
            if lane.buckets or len(shares) == 1:
                lanes.append(lane)
    return TransferPlan(manifest, order, tuple(lanes))


def _receivers(
    holders: Holders, landings: Mapping[str, Sequence[Move]], workers: Sequence[str], *, paired: bool
) -> Iterator[tuple[str, list[int], Mapping[int, Boxes]]]:
    """Yield workers that receive the same, with the digest of their moves and what each trainer rank sends them."""
    if paired:
        for worker, digest in enumerate(workers):
            yield digest, [worker], holders.shares(preferred=worker)
        return
    shares = holders.shares()
    for digest in landings:
        yield digest, [worker for worker, kind in enumerate(workers) if kind == digest], shares


def wire_manifest(manifest: Manifest, landings: Iterable[Sequence[Move]]) -> Manifest:
    """Return the trainer's manifest with the dtype in which each parameter travels, the widest of all moves."""
    dtypes: dict[int, torch.dtype] = {}
    for moves in landings:
        for move in moves:
            known = dtypes.get(move.param)
            if known is None or known.itemsize < move.source.dtype.itemsize:
                dtypes[move.param] = move.source.dtype
    specs = enumerate(manifest.specs)
    return Manifest(tuple(replace(spec, dtype=dtypes.get(index, spec.dtype)) for index, spec in specs))


def memory_order(landings: Iterable[Sequence[Move]]) -> tuple[int, ...]:
    """Return the parameters in the order of the first position that each has in the workers' memory."""
    ordinals: dict[tuple[int | None, str], int] = {}
    first: dict[int, tuple[int, int]] = {}
    for moves in landings:
        for move in moves:
            ordinal = ordinals.setdefault((move.stage, move.target), len(ordinals))
            position = ordinal, move.region.offset
            first[move.param] = min(position, first.get(move.param, position))
    return tuple(sorted(first, key=lambda param: (first[param], param)))
