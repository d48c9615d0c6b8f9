"""Prompts on their way: which engine has which, and what comes back (every trainer rank)."""

import contextlib
import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import msgspec

from rollcast.rollout.pool.client import Links
from rollcast.rollout.pool.metrics import Metrics
from rollcast.rollout.pool.router import Router
from rollcast.rollout.protocol.messages import Abort, Generate, Generated, Reply, RunBatch, expect
from rollcast.rollout.protocol.registry import Roster
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling, plain_tokens


class Repeatable:
    """For `RolloutConfig(deterministic=True)`. Draws the same seeds for the same requests in the same order."""

    def __init__(self, seed: int, *, rank: int) -> None:
        self._random = random.Random(f"{seed}/{rank}")
        self._names = (f"{rank}/{number}" for number in itertools.count())

    def seeded(self, sampling: Sampling) -> Sampling:
        """With a seed of its own, unless it has one."""
        if sampling.seed is not None:
            return sampling
        return msgspec.structs.replace(sampling, seed=self._random.getrandbits(31))

    @contextlib.contextmanager
    def batch(self, run: Callable[[int, str], object]) -> "Iterator[Batch]":
        """Requests that are sent meanwhile are a batch; `run(engine, name)` is called when all are sent."""
        batch = Batch(next(self._names))
        try:
            yield batch
        finally:
            # After a failure, too: those that were sent wait for it, even to be aborted.
            for engine in sorted(batch.engines):
                run(engine, batch.name)


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that an engine runs together."""

    name: str
    engines: set[int] = field(default_factory=set)

    def joined_by(self, engine: int) -> str:
        """The name, for a request that goes there."""
        self.engines.add(engine)
        return self.name


@dataclass(frozen=True, slots=True)
class _Trip:
    """A prompt that is with an engine."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    engine: int
    done: "Future[list[Completion]]"

    @property
    def tokens(self) -> int:
        """Most that may be sampled."""
        return self.sampling.n * self.sampling.max_tokens


class Dispatch(Links):
    """Hands prompts to engines and keeps account of them. Calls may come from any thread."""

    def __init__(
        self,
        roster: Roster,
        addresses: Sequence[str],
        *,
        max_model_len: int,
        rank: int = 0,
        metrics: Metrics | None = None,
        repeatable: Repeatable | None = None,
    ) -> None:
        self._max_model_len = max_model_len
        self.metrics = metrics or Metrics()
        self._name = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._repeatable = repeatable
        self._router = Router(len(addresses), first=rank, in_turn=repeatable is not None)
        # By request id: the engine that it went to.
        self._owners: dict[str, int] = {}
        super().__init__(roster, addresses)

    def new_ids(self, count: int) -> list[str]:
        """Names for requests that have none."""
        return [f"{self._name}-{next(self._numbers)}" for _ in range(count)]

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        request_ids: Sequence[str],
        *,
        priority: int,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> "list[Future[list[Completion]]]":
        """Send prompts to engines, all or none; their completions to come. A future that is cancelled is aborted.

        Raises `ValueError` for a prompt that does not fit, or an id that is under way.
        """
        plain = [plain_tokens(prompt) for prompt in prompts]
        check_prompts(plain, max_model_len=self._max_model_len)
        with self._batch() as batch:
            trips = self._admit(plain, sampling, request_ids)
            stream = on_piece is not None
            asks = [(its.engine, self._ask(its, priority=priority, stream=stream, batch=batch)) for its in trips]
            try:
                replies = self.request_all(asks, on_piece=on_piece)
            except Exception as error:
                for trip in trips:
                    self._leave(trip, [])
                    trip.done.set_exception(error)
            else:
                for trip, reply in zip(trips, replies, strict=True):
                    reply.add_done_callback(partial(self._end, trip))
                    trip.done.add_done_callback(partial(self._abort_if_cancelled, trip))
        return [trip.done for trip in trips]

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests of this pool, or all, with what they have: finish reason "abort". Not collective.

        Does not wait: whoever waits for them gets them. Ids of requests that are over, or unknown, are passed over.
        """
        with self._lock:
            wanted = [*self._owners] if request_ids is None else request_ids
            owned = [(self._owners[each], each) for each in wanted if each in self._owners]
        for engine in {engine for engine, _ in owned}:
            self.request(engine, Abort([self._known_as(each) for owner, each in owned if owner == engine]))

    def _known_as(self, request_id: str) -> str:
        """A request's name at the engines: other trainer ranks give the same ones."""
        return f"{self._name}/{request_id}"

    def _admit(self, prompts: Sequence[list[int]], sampling: Sampling, request_ids: Sequence[str]) -> list[_Trip]:
        """Choose an engine for each."""
        with self._lock:
            taken = {*self._owners}
            for request_id in request_ids:
                if request_id in taken:
                    raise ValueError(f"request {request_id!r} is under way: give each an id of its own")
                taken.add(request_id)
            return [self._route(*each, sampling) for each in zip(request_ids, prompts, strict=True)]

    def _route(self, request_id: str, prompt: list[int], sampling: Sampling) -> _Trip:
        if self._repeatable is not None:
            sampling = self._repeatable.seeded(sampling)
        engine = self._router.start(prompt, tokens=sampling.n * sampling.max_tokens)
        self._owners[request_id] = engine
        self.metrics.under_way(engine, 1, load=self._router.loads[engine])
        return _Trip(request_id, prompt, sampling, engine, Future())

    def _end(self, trip: _Trip, reply: "Future[Reply]") -> None:
        """The engine has answered, or will not."""
        error = reply.exception()
        group = [] if error else expect(reply.result(), Generated).group
        self._leave(trip, group)
        if not trip.done.set_running_or_notify_cancel():
            return
        if error:
            trip.done.set_exception(error)
        else:
            trip.done.set_result(group)

    def _leave(self, trip: _Trip, group: list[Completion]) -> None:
        engine = trip.engine
        with self._lock:
            del self._owners[trip.request_id]
            self._router.end(engine, trip.prompt, tokens=trip.tokens)
            self.metrics.under_way(engine, -1, load=self._router.loads[engine])
            if len(group) == 1:
                # It may be a turn of a conversation.
                self._router.hold([*trip.prompt, *group[0].token_ids], engine)
        self.metrics.finished(engine, group)

    def _abort_if_cancelled(self, trip: _Trip, done: "Future[list[Completion]]") -> None:
        if done.cancelled():
            self.abort([trip.request_id])

    def _batch(self) -> "contextlib.AbstractContextManager[Batch | None]":
        if self._repeatable is None:
            return contextlib.nullcontext()
        return self._repeatable.batch(lambda engine, name: self.request(engine, RunBatch(name)))

    def _ask(self, trip: _Trip, *, priority: int, stream: bool, batch: Batch | None) -> Generate:
        return Generate(
            request_id=self._known_as(trip.request_id),
            prompt=trip.prompt,
            sampling=trip.sampling,
            priority=priority,
            stream=stream,
            batch=batch.joined_by(trip.engine) if batch else "",
        )


def check_prompts(prompts: Sequence[Sequence[int]], *, max_model_len: int) -> None:
    """Every prompt must leave room for one token. Raises `ValueError` naming the first that does not."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: an engine needs at least one token")
        if len(prompt) >= max_model_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, but max_model_len is {max_model_len} "
                "(prompt and completion together): shorten it or raise max_model_len"
            )
