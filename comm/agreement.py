"""Small decisions that all trainer ranks share, made by rank 0 over the job's store (trainer ranks)."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import msgspec
from torch import distributed as dist

from rollcast.comm.deadline import Deadline

# Ranks other than 0 wait a little longer than rank 0 does, whose verdict may be that another rank is late.
MARGIN_S = 2.0
NO_WAIT = timedelta(milliseconds=1)

T = TypeVar("T")


class Verdict(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What rank 0 has decided; every rank gets the same record."""

    value: T | None = None
    """What rank 0 made of all contributions; None with an error."""
    error: str = ""
    """Why there is no value."""
    late_rank: int | None = None
    """The rank that did not take part in time, if that is the error."""


class _Contribution(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What one rank writes into the store."""

    value: T | None = None
    """None: the rank has stopped waiting for rank 0."""
    error: str = ""
    """Why the rank cannot take part."""


class Agreement:
    """Collects one value from every rank, lets rank 0 combine them, and gives all ranks the result.

        verdict = agreement.decide("sync 3", StepOutcome(failures), merge, deadline=Deadline(60))
        if verdict.late_rank is not None: ...

    A topic is used once. Values cross the store as JSON: strings, numbers, or `msgspec.Struct`s of such, never None.
    """

    def __init__(self, store: dist.Store, *, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._old_keys: list[str] = []

    def decide(self, topic: str, value: T, combine: Callable[[Sequence[T]], T], *, deadline: Deadline) -> Verdict[T]:
        """Return the verdict on the values of all ranks. Collective.

        `combine` is called on rank 0 only, with the values in rank order; a `ValueError` that it raises becomes the
        verdict's `error`. A rank that does not come in time is named by the verdict, rank 0 included.
        """
        kind = type(value)
        if self._size == 1:
            return _combine(combine, [value])
        self._put(topic, self._rank, _Contribution(value=value))
        if self._rank:
            return self._await_verdict(topic, kind, deadline)
        values: list[T] = []
        for rank in range(self._size):
            contribution = self._await_contribution(topic, rank, kind, deadline)
            if contribution.error:
                return self._publish(topic, Verdict(error=contribution.error))
            if contribution.value is None:
                return self._publish(topic, _late(rank, deadline))
            values.append(contribution.value)
        # Every rank that is here has read the verdicts of earlier topics.
        for key in self._old_keys:
            self._store.delete_key(key)
        self._old_keys.clear()
        return self._publish(topic, _combine(combine, values))

    def leave(self, topic: str, value: object) -> None:
        """Contribute to a topic without waiting for its verdict; from rank 0, `value` is the verdict. Not collective.

        For a rank that cannot go on: ranks that come to the topic, however late, get its value.
        """
        if self._size == 1:
            return
        if self._rank:
            self._put(topic, self._rank, _Contribution(value=value))
        else:
            self._publish(topic, Verdict(value=value))

    def refuse(self, topic: str, error: str) -> None:
        """Let every rank that comes to the topic, however late, have a verdict with this error. Not collective."""
        error = f"trainer rank {self._rank}: {error}"
        if self._rank:
            self._put(topic, self._rank, _Contribution(error=error))
        elif self._size > 1:
            self._publish(topic, Verdict(error=error))

    def _put(self, topic: str, rank: int, contribution: _Contribution[Any]) -> None:
        self._store.set(f"{topic}/{rank}", msgspec.json.encode(contribution).decode())

    def _publish(self, topic: str, verdict: Verdict[T]) -> Verdict[T]:
        key = f"{topic}/verdict"
        self._store.set(key, msgspec.json.encode(verdict).decode())
        self._old_keys.append(key)
        return verdict

    def _await_contribution(self, topic: str, rank: int, kind: type[T], deadline: Deadline) -> _Contribution[T]:
        """Take a rank's contribution from the store. A rank that does not come counts as one that stopped waiting."""
        key = f"{topic}/{rank}"
        try:
            self._store.wait([key], deadline.left(f"trainer rank {rank}"))
        except (dist.DistStoreError, TimeoutError):
            return _Contribution()
        contribution = msgspec.json.decode(self._store.get(key), type=_Contribution[kind])
        self._store.delete_key(key)
        return contribution

    def _await_verdict(self, topic: str, kind: type[T], deadline: Deadline) -> Verdict[T]:
        key = f"{topic}/verdict"
        try:
            self._store.wait([key], timedelta(seconds=deadline.left_s() + MARGIN_S))
        except dist.DistStoreError:
            # Stop taking part, so that a rank 0 that is merely late does not go on without this rank ...
            self._put(topic, self._rank, _Contribution())
            try:
                self._store.wait([key], NO_WAIT)  # ... unless it just has.
            except dist.DistStoreError:
                return _late(0, deadline)
        return msgspec.json.decode(self._store.get(key), type=Verdict[kind])


def unanimous(values: Sequence[T]) -> T:
    """Return the value that all ranks gave. Raises `ValueError` naming the first rank that gave another."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"trainer ranks 0 and {rank} disagree: {values[0]} against {value}; every rank must make the "
                "same call, with a model of the same parameters"
            )
    return values[0]


def _combine(combine: Callable[[Sequence[T]], T], values: Sequence[T]) -> Verdict[T]:
    try:
        return Verdict(value=combine(values))
    except ValueError as error:
        return Verdict(error=str(error))


def _late(rank: int, deadline: Deadline) -> Verdict[Any]:
    return Verdict(error=f"trainer rank {rank} did not come within {deadline.timeout_s:g} s", late_rank=rank)
