"""One worker's moves as messages, and messages as buckets: pure functions, the same on both sides."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from rollcast.comm.device.storage import ALIGN_BYTES, aligned
from rollcast.comm.plan.region import Region

# A contiguous piece of at least this size is a message of its own: it can be sent without a copy into a buffer.
LARGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Move:
    """One piece of one parameter: from a region of the trainer's full tensor to a region of a worker's tensor."""

    param: int
    """Index into the manifest."""
    source: Region
    """Region of a contiguous tensor of the parameter's shape and of the dtype on the wire, which the worker chooses."""
    target: str
    """The worker's name of the tensor."""
    region: Region
    """Region of the target, of the same shape as `source`."""
    stage: int | None = None
    """The worker's number of the module that must be processed when all its moves have arrived. None: the target is
    the live tensor itself."""

    @property
    def in_place(self) -> bool:
        """Whether the bytes on the wire can be received straight into the target."""
        return self.stage is None and self.region.is_contiguous and self.source.dtype == self.region.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.source.nbytes


@dataclass(frozen=True, slots=True)
class Message:
    """One contiguous run of bytes on the wire: the pieces of one region of one target, in order."""

    target: str
    stage: int | None
    region: Region
    pieces: tuple[tuple[int, Region], ...]
    """(parameter, source region) of each piece."""
    in_place: bool
    """See `Move.in_place`."""
    nbytes: int
    offset: int
    """First byte in the bucket's buffer, where one is used."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype on the wire."""
        return self.pieces[0][1].dtype

    def __str__(self) -> str:
        first = self.region.offset
        return f"{self.target}[{first}:{first + self.region.numel}]"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Messages that travel in one grouped collective."""

    messages: tuple[Message, ...]
    nbytes: int
    """Size of a buffer that holds all of them."""
    position: int
    """Place of its last parameter in the order of sending."""
    finishes: tuple[int, ...] = ()
    """The stages whose last message in this lane is in this bucket."""


def fill_buckets(moves: Sequence[Move], order: Sequence[int], *, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cut one worker's moves into buckets of at most `bucket_bytes` bytes, parameter by parameter in this order.

    A stage's last message ends its bucket, so that the workers can process the module while the sender goes on, even
    where processing is collective over them. Raises `ValueError` if `bucket_bytes` is less than `ALIGN_BYTES`.
    """
    if bucket_bytes < ALIGN_BYTES:
        raise ValueError(f"bucket_bytes must be at least {ALIGN_BYTES}, got {bucket_bytes}")
    position = {param: index for index, param in enumerate(order)}
    messages = _messages(moves, position, bucket_bytes)
    last = {message.stage: index for index, message in enumerate(messages) if message.stage is not None}
    buckets: list[Bucket] = []
    current: list[Message] = []
    used = 0

    def close(*finishes: int) -> None:
        buckets.append(Bucket(tuple(current), used, position[current[-1].pieces[-1][0]], finishes))
        current.clear()

    for index, message in enumerate(messages):
        if current and aligned(used) + message.nbytes > bucket_bytes:
            close()
            used = 0
        current.append(replace(message, offset=aligned(used)))
        used = aligned(used) + message.nbytes
        if message.stage is not None and last[message.stage] == index:
            close(message.stage)
            used = 0
    if current:
        close()
    return tuple(buckets)


def _messages(moves: Sequence[Move], position: Mapping[int, int], bucket_bytes: int) -> list[Message]:
    """Return the moves by position as messages: adjacent ones merged, those larger than a bucket split."""
    messages: list[Message] = []
    for whole in sorted(moves, key=lambda move: position[move.param]):
        for move in _split(whole, bucket_bytes // whole.source.dtype.itemsize):
            message = _message(move)
            if messages and (merged := _merged(messages[-1], message, bucket_bytes)):
                messages[-1] = merged
            else:
                messages.append(message)
    return messages


def _message(move: Move) -> Message:
    return Message(
        move.target, move.stage, move.region, ((move.param, move.source),), move.in_place, move.nbytes, offset=0
    )


def _merged(first: Message, second: Message, bucket_bytes: int) -> Message | None:
    """Return the two as one message, if their targets adjoin and neither is better sent without a copy."""
    region, following = first.region, second.region
    if (
        (first.target, first.stage, region.dtype, first.dtype)
        != (second.target, second.stage, following.dtype, second.dtype)
        or not (region.is_contiguous and following.is_contiguous)
        or region.offset + region.numel != following.offset
        or first.nbytes + second.nbytes > bucket_bytes
        or _is_large(first)
        or _is_large(second)
    ):
        return None
    both = Region((region.numel + following.numel,), (1,), region.offset, region.dtype)
    return replace(first, region=both, pieces=first.pieces + second.pieces, nbytes=first.nbytes + second.nbytes)


def _is_large(message: Message) -> bool:
    return len(message.pieces) == 1 and message.nbytes >= LARGE_BYTES and message.pieces[0][1].is_contiguous


def _split(move: Move, max_numel: int) -> Iterator[Move]:
    """Yield the move in parts of at most `max_numel` elements."""
    source, region = move.source, move.region
    if source.numel <= max_numel:
        if source.numel:
            yield move
        return
    if source.is_contiguous and region.is_contiguous:
        source, region = source.flat(), region.flat()
    rows = max_numel // prod(source.shape[1:])
    step = max(rows, 1)
    for start in range(0, source.shape[0], step):
        part = replace(move, source=source.rows(start, step), region=region.rows(start, step))
        if rows:
            yield part
        else:
            yield from _split(replace(part, source=part.source.row(), region=part.region.row()), max_numel)
