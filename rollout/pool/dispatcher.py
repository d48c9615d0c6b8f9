"""Prompts in flight: which engine has which, and what comes back (every trainer rank)."""

import contextlib
import itertools
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import msgspec

from rollcast.rollout.pool.client import EngineClient
from rollcast.rollout.pool.metrics import Metrics
from rollcast.rollout.pool.router import Router
from rollcast.rollout.protocol.messages import Abort, Generate, Generated, Reply, RunBatch, expect
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling, plain_tokens


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """Requests that an engine runs together."""

    name: str
    engines: set[int] = field(default_factory=set)
    """Engines that have requests of this batch."""


class DeterministicRequests:
    """Seeds and batches for `RolloutConfig(deterministic=True)`: the same for the same calls in the same order."""

    def __init__(self, seed: int, *, rank: int) -> None:
        self._random = random.Random(f"{seed}/{rank}")
        self._names = (f"{rank}/{number}" for number in itertools.count())

    def seeded(self, sampling: Sampling) -> Sampling:
        """Return the sampling with the next seed, unless it has one."""
        if sampling.seed is not None:
            return sampling
        return msgspec.structs.replace(sampling, seed=self._random.getrandbits(31))

    @contextlib.contextmanager
    def batch(self, run: Callable[[int, str], object]) -> Iterator[RequestBatch]:
        """Collect the requests that are sent inside into a batch; then call `run(engine, name)` for each engine."""
        batch = RequestBatch(next(self._names))
        try:
            yield batch
        finally:
            # After a failure, too: requests that were sent wait for it, even to be aborted.
            for engine in sorted(batch.engines):
                run(engine, batch.name)


@dataclass(frozen=True, slots=True)
class InflightRequest:
    """A prompt that an engine has."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    engine: int
    done: "Future[list[Completion]]"

    @property
    def max_tokens(self) -> int:
        """Most tokens that may be sampled, over all samples."""
        return self.sampling.n * self.sampling.max_tokens


class Dispatcher:
    """Sends prompts to engines and keeps account of them. Calls may come from any thread.

    dispatcher = Dispatcher(client, max_model_len=4096, rank=0, metrics=Metrics())
    (future,) = dispatcher.start([prompt], sampling, dispatcher.new_ids(1), priority=0)
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        max_model_len: int,
        rank: int,
        metrics: Metrics,
        deterministic: DeterministicRequests | None = None,
    ) -> None:
        self._client = client
        self._max_model_len = max_model_len
        self._metrics = metrics
        self._name = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._deterministic = deterministic
        self._router = Router(client.engines, first=rank, in_turn=deterministic is not None)
        # By request id: the engine that has it.
        self._engines: dict[str, int] = {}
        self._lock = threading.Lock()

    def new_ids(self, count: int) -> list[str]:
        """Return ids for requests that have none."""
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
        """Send prompts to engines, all or none, and return futures of their completions.

        A future that is cancelled aborts its request. Raises `ValueError` for a prompt that does not fit, or an id
        that is in flight.
        """
        plain = [plain_tokens(prompt) for prompt in prompts]
        check_prompts(plain, max_model_len=self._max_model_len)
        with self._batch() as batch:
            inflight = self._admit(plain, sampling, request_ids)
            stream = on_piece is not None
            messages = [
                (each.engine, self._message(each, priority=priority, stream=stream, batch=batch)) for each in inflight
            ]
            try:
                replies = self._client.request_many(messages, on_piece=on_piece)
            except Exception as error:
                for request in inflight:
                    self._remove(request, [])
                    request.done.set_exception(error)
            else:
                for request, reply in zip(inflight, replies, strict=True):
                    reply.add_done_callback(partial(self._finish, request))
                    request.done.add_done_callback(partial(self._abort_if_cancelled, request))
        return [request.done for request in inflight]

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests of this pool, or all, with the tokens they have: finish reason "abort".

        Does not wait: their futures get what they have. Ids that are unknown or finished are ignored.
        """
        with self._lock:
            ids = [*self._engines] if request_ids is None else request_ids
            inflight = [(self._engines[each], each) for each in ids if each in self._engines]
        for engine in {engine for engine, _ in inflight}:
            self._client.request(engine, Abort([self._engine_id(each) for at, each in inflight if at == engine]))

    def _engine_id(self, request_id: str) -> str:
        """Return the request's id at the engines, where other trainer ranks may use the same ids."""
        return f"{self._name}/{request_id}"

    def _admit(
        self, prompts: Sequence[list[int]], sampling: Sampling, request_ids: Sequence[str]
    ) -> list[InflightRequest]:
        """Choose an engine for each prompt."""
        with self._lock:
            taken = {*self._engines}
            for request_id in request_ids:
                if request_id in taken:
                    raise ValueError(f"request {request_id!r} is under way: give each an id of its own")
                taken.add(request_id)
            return [self._route(*each, sampling) for each in zip(request_ids, prompts, strict=True)]

    def _route(self, request_id: str, prompt: list[int], sampling: Sampling) -> InflightRequest:
        if self._deterministic is not None:
            sampling = self._deterministic.seeded(sampling)
        engine = self._router.start(prompt, tokens=sampling.n * sampling.max_tokens)
        self._engines[request_id] = engine
        self._metrics.requests_changed(engine, 1, load_tokens=self._router.loads[engine])
        return InflightRequest(request_id, prompt, sampling, engine, Future())

    def _finish(self, request: InflightRequest, reply: "Future[Reply]") -> None:
        """Complete a request's future: the engine has replied, or will not."""
        error = reply.exception()
        group = [] if error else expect(reply.result(), Generated).group
        self._remove(request, group)
        if not request.done.set_running_or_notify_cancel():
            return
        if error:
            request.done.set_exception(error)
        else:
            request.done.set_result(group)

    def _remove(self, request: InflightRequest, group: list[Completion]) -> None:
        engine = request.engine
        with self._lock:
            del self._engines[request.request_id]
            self._router.end(engine, request.prompt, tokens=request.max_tokens)
            self._metrics.requests_changed(engine, -1, load_tokens=self._router.loads[engine])
            if len(group) == 1:
                # It may be a turn of a conversation.
                self._router.hold([*request.prompt, *group[0].token_ids], engine)
        self._metrics.finished(engine, group)

    def _abort_if_cancelled(self, request: InflightRequest, done: "Future[list[Completion]]") -> None:
        if done.cancelled():
            self.abort([request.request_id])

    def _batch(self) -> "contextlib.AbstractContextManager[RequestBatch | None]":
        if self._deterministic is None:
            return contextlib.nullcontext()
        return self._deterministic.batch(lambda engine, name: self._client.request(engine, RunBatch(name)))

    def _message(
        self, request: InflightRequest, *, priority: int, stream: bool, batch: RequestBatch | None
    ) -> Generate:
        if batch is not None:
            batch.engines.add(request.engine)
        return Generate(
            request_id=self._engine_id(request.request_id),
            prompt=request.prompt,
            sampling=request.sampling,
            priority=priority,
            stream=stream,
            batch=batch.name if batch else "",
        )


def check_prompts(prompts: Sequence[Sequence[int]], *, max_model_len: int) -> None:
    """Raise `ValueError` naming the first prompt that is empty or leaves no room for one token."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: an engine needs at least one token")
        if len(prompt) >= max_model_len:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, but max_model_len is {max_model_len} "
                "(prompt and completion together): shorten it or raise max_model_len"
            )
