"""How a manifest is cut into buckets: pure data, the same on both sides.

A bucket is one broadcast. Parameters keep their order; each starts at a multiple of `ALIGN_BYTES` in its
bucket; one that does not fit in a bucket is split over several.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from rollcast.comm.params import Manifest

# Copies are fastest, and views of any dtype possible, when every slice starts at a multiple of this.
ALIGN_BYTES = 256


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a run of one parameter's elements lies in a bucket."""

    param: int
    """Index into the manifest."""
    start: int
    """First element of the run, in the flattened parameter."""
    numel: int
    offset: int
    """First byte of the run in the bucket."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Slots that travel in one broadcast of `nbytes` bytes."""

    nbytes: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class BucketPlan:
    """Every bucket of one sync. Both sides build it with `build_plan` and compare `digest`."""

    manifest: Manifest
    bucket_bytes: int
    buckets: tuple[Bucket, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the wire, padding included."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @cached_property
    def buffer_bytes(self) -> int:
        """Bytes that a bucket buffer needs."""
        return max(bucket.nbytes for bucket in self.buckets)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over the manifest and every slot."""
        state = hashlib.sha256(self.manifest.digest.encode())
        for bucket in self.buckets:
            state.update(repr((bucket.nbytes, bucket.slots)).encode())
        return state.hexdigest()


def build_plan(manifest: Manifest, *, bucket_bytes: int) -> BucketPlan:
    """Cut `manifest` into buckets of at most `bucket_bytes` bytes. Deterministic and without communication."""
    if bucket_bytes < ALIGN_BYTES:
        raise ValueError(f"bucket_bytes must be at least {ALIGN_BYTES}, got {bucket_bytes}")
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used = 0

    def close() -> None:
        nonlocal used
        if slots:
            buckets.append(Bucket(used, tuple(slots)))
        slots.clear()
        used = 0

    for index, spec in enumerate(manifest.specs):
        if _aligned(used) + spec.nbytes > bucket_bytes:
            close()
        start = 0
        while True:
            offset = _aligned(used)
            numel = min(spec.numel - start, (bucket_bytes - offset) // spec.dtype.itemsize)
            slots.append(Slot(index, start, numel, offset))
            used, start = offset + numel * spec.dtype.itemsize, start + numel
            if start == spec.numel:
                break
            close()
    close()
    return BucketPlan(manifest, bucket_bytes, tuple(buckets))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
