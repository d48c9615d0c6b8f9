"""What travels on which lane, and in which order: pure data and pure functions, the same on both sides.

A worker says where each piece of each parameter lands in it (`Move`). Workers with equal moves share a lane.
A lane's moves, in the order of their targets, become messages, and messages become buckets; a bucket is one
grouped collective.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rollcast.comm.plan.buckets import Bucket, Message, Move, fill_buckets
from rollcast.comm.plan.manifest import Manifest
from rollcast.comm.plan.region import Region


@dataclass(frozen=True)
class Lane:
    """One sending trainer rank and all workers that keep exactly the same bytes."""

    index: int
    sender: int
    """Trainer rank."""
    workers: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over every message of every bucket."""
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
    """Every lane of one sync. All trainer ranks hold the same; a worker holds its own lane."""

    manifest: Manifest
    walk: tuple[int, ...]
    """Parameters in the order in which the trainer ranks gather them: that of the workers' memory."""
    lanes: tuple[Lane, ...]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over all of it: equal digests mean equal plans."""
        lanes = [(lane.index, lane.sender, lane.workers, lane.digest) for lane in self.lanes]
        return hashlib.sha256(repr((self.manifest.digest, self.walk, lanes)).encode()).hexdigest()

    def lane_of(self, worker: int) -> Lane:
        """The lane that a worker receives on."""
        return next(lane for lane in self.lanes if worker in lane.workers)


def whole_moves(manifest: Manifest) -> tuple[Move, ...]:
    """Moves of a worker that keeps every parameter whole, under the trainer's name."""
    return tuple(
        Move(index, region, spec.name, region)
        for index, spec in enumerate(manifest.specs)
        if (region := Region.whole(spec.shape, spec.dtype)).numel
    )


def build_transfer(
    manifest: Manifest,
    landings: Mapping[str, Sequence[Move]],
    workers: Sequence[str],
    *,
    senders: int = 1,
    bucket_bytes: int,
    paired: bool = False,
) -> TransferPlan:
    """Plan the sync of `manifest` into workers that keep `landings[workers[i]]`. Deterministic, no communication.

    `landings` maps a digest to moves in the order of the worker's memory. Lanes go round the `senders` trainer
    ranks; with `paired`, each worker has a lane of its own, sent by the trainer rank of its number. Raises
    `ValueError` naming the first parameter that no worker keeps.
    """
    used = {move.param for moves in landings.values() for move in moves}
    for index, spec in enumerate(manifest.specs):
        if index not in used and spec.numel:
            raise ValueError(f"the engine's model has no place for parameter {spec}: do not send it")
    walk = walk_order(landings.values())
    buckets = {digest: fill_buckets(moves, walk, bucket_bytes=bucket_bytes) for digest, moves in landings.items()}
    if paired:
        lanes = [Lane(worker, worker, (worker,), buckets[digest]) for worker, digest in enumerate(workers)]
    else:
        lanes = [
            Lane(index, index % senders, tuple(w for w, its in enumerate(workers) if its == digest), buckets[digest])
            for index, digest in enumerate(landings)
        ]
    return TransferPlan(manifest, walk, tuple(lanes))


def walk_order(landings: Iterable[Sequence[Move]]) -> tuple[int, ...]:
    """Parameters by the first place that they reach in the workers' memory."""
    ordinals: dict[tuple[int | None, str], int] = {}
    first: dict[int, tuple[int, int]] = {}
    for moves in landings:
        for move in moves:
            ordinal = ordinals.setdefault((move.stage, move.target), len(ordinals))
            place = ordinal, move.region.offset
            first[move.param] = min(place, first.get(move.param, place))
    return tuple(sorted(first, key=lambda param: (first[param], param)))
