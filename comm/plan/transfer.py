"""What travels on which lane, and in which order: frozen data and pure functions, the same on both sides.

Each worker lists where each piece of each parameter lands in it (`Move`). Workers with equal moves share a lane. A
lane's moves, in the order in which the parameters are gathered, become messages, and messages become buckets; a bucket
is one grouped collective.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rollcast.comm.plan.buckets import Bucket, Message, Move, fill_buckets
from rollcast.comm.plan.manifest import Manifest


@dataclass(frozen=True)
class Lane:
    """One sending trainer rank and all workers that receive exactly the same bytes."""

    index: int
    sender: int
    """Trainer rank."""
    workers: tuple[int, ...]
    buckets: tuple[Bucket, ...]

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
    """Every lane of a sync. All trainer ranks hold equal plans; a worker holds its own lane only."""

    manifest: Manifest
    gather_order: tuple[int, ...]
    """Parameters (indices into the manifest) in the order in which the trainer ranks gather them."""
    lanes: tuple[Lane, ...]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the whole plan: equal digests mean equal plans."""
        lanes = [(lane.index, lane.sender, lane.workers, lane.digest) for lane in self.lanes]
        return hashlib.sha256(repr((self.manifest.digest, self.gather_order, lanes)).encode()).hexdigest()

    def lane_of(self, worker: int) -> Lane:
        """Return the lane on which a worker receives. Workers are numbered over all engines."""
        return next(lane for lane in self.lanes if worker in lane.workers)


def build_transfer(
    manifest: Manifest,
    landings: Mapping[str, Sequence[Move]],
    workers: Sequence[str],
    *,
    senders: int = 1,
    bucket_bytes: int,
    paired: bool = False,
) -> TransferPlan:
    """Plan the sync of `manifest` into workers, of which worker `i` keeps `landings[workers[i]]`.

    Deterministic, without communication. `landings` maps a digest to moves in the order of the worker's memory. Lanes
    are assigned to the `senders` trainer ranks round-robin; with `paired`, each worker has a lane of its own, sent by
    the trainer rank of its number. Raises `ValueError` naming the first parameter that no worker keeps.
    """
    kept = {move.param for moves in landings.values() for move in moves}
    for index, spec in enumerate(manifest.specs):
        if index not in kept and spec.numel:
            raise ValueError(f"the engine's model has no place for parameter {spec}: do not send it")
    gather_order = memory_order(landings.values())
    buckets = {
        digest: fill_buckets(moves, gather_order, bucket_bytes=bucket_bytes) for digest, moves in landings.items()
    }
    if paired:
        lanes = [Lane(worker, worker, (worker,), buckets[digest]) for worker, digest in enumerate(workers)]
    else:
        lanes = [
            Lane(index, index % senders, tuple(w for w, kind in enumerate(workers) if kind == digest), buckets[digest])
            for index, digest in enumerate(landings)
        ]
    return TransferPlan(manifest, gather_order, tuple(lanes))


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
