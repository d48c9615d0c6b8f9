"""vLLM's engine client for vLLM's own server: its requests take part in syncs, and tell their versions (engine)."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rollcast.rollout.engine.requests import Requests
from rollcast.rollout.engine.samples import Spans, spans_of
from rollcast.rollout.errors import EngineError


@dataclass(slots=True)
class Told:
    """What an HTTP response can say of the weights that made it."""

    spans: dict[int, Spans] = field(default_factory=dict)
    """(version, first token) of each sample so far, in the order of the response's choices."""
    version: int | None = None
    """Of the newest token; in a stream, of what goes out next."""
    samples: int = 0
    refusal: str = ""
    """Why there is no answer, if so."""


TOLD: ContextVar[Told | None] = ContextVar("told", default=None)


class VersionedClient:
    """Stands between vLLM's server and its `AsyncLLM`, whose methods it has.

    What `generate` makes goes through `Requests`: it is held while weights change, goes on under the new ones, and
    is refused when there are none. Each sample is a request of its own. `TOLD` learns the versions.
    """

    def __init__(self, llm: Any, requests: Requests, *, refusal: Callable[[], str]) -> None:
        self._llm = llm
        self._requests = requests
        self._refusal = refusal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def check_health(self) -> None:
        """As vLLM's. An engine that refuses to generate is not healthy, either."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._refusal():
            raise EngineDeadError
        await self._llm.check_health()

    def generate(
        self, prompt: Mapping[str, Any], sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """As vLLM's, for a prompt in the form of its `EngineInput`. Raises `EngineError` if nothing is served."""
        if not isinstance(prompt, Mapping) or prompt.get("type") != "token":
            # vLLM keeps what an encoder makes of an image by the image alone, whatever its weights were.
            raise ValueError("this server takes text alone: vLLM would reuse what older weights have made of the rest")
        told = TOLD.get() or Told()
        first, told.samples = told.samples, told.samples + sampling_params.n
        return self._generate(prompt, sampling_params, request_id, told, first, more)

    async def _generate(
        self, prompt: Mapping[str, Any], params: Any, request_id: str, told: Told, first: int, more: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        results: asyncio.Queue[_Made | _End] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        for index, single in enumerate(_singles(params)):
            sample = _Sample(prompt, single, index, first + index, more)
            tasks.append(task := asyncio.create_task(self._make(sample, results.put_nowait)))
            self._requests.admit(task)
            task.add_done_callback(partial(_end, results))
        try:
            async for found in _joined(results, len(tasks), told, whole=_is_final(params)):
                found.request_id = request_id
                yield found
        except EngineError as error:
            told.refusal = str(error)
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _make(self, sample: "_Sample", put: "Callable[[_Made], None]") -> None:
        try:
            await self._run(sample, put)
        except asyncio.CancelledError:
            # By `Requests.refuse`, or because nobody wants it any more.
            if why := self._refusal():
                raise EngineError(why) from None
            raise

    def _check(self) -> None:
        if why := self._refusal():
            raise EngineError(why)

    async def _run(self, sample: "_Sample", put: "Callable[[_Made], None]") -> None:
        """Run one sample until it ends; again, if it is taken back before it has begun."""
        finished = False
        while not finished:
            self._check()
            await self._requests.decided()
            # It may have fallen asleep meanwhile.
            self._check()
            async for found, number, switches in self._requests.follow(
                sample.prompt, sample.params, numbers=set(), **sample.more
            ):
                finished = found.finished
                (output,) = found.outputs
                output.index = sample.index
                sample.count += len(output.token_ids)
                put(_Made(found, sample.place, spans_of(switches, number, sample.count)))


@dataclass(slots=True)
class _Sample:
    """One of the samples of a request."""

    prompt: Mapping[str, Any]
    params: Any
    index: int
    place: int
    """Among all samples of the response."""
    more: dict[str, Any]
    count: int = 0
    """Tokens so far."""


def _is_final(params: Any) -> bool:
    from vllm.sampling_params import RequestOutputKind

    return params.output_kind is RequestOutputKind.FINAL_ONLY


def _singles(params: Any) -> Iterator[Any]:
    """Parameters of each of `params.n` samples; seeds as vLLM makes them."""
    for index in range(params.n):
        single = params.clone()
        single.n = 1
        if params.seed is not None:
            single.seed = params.seed + index
        yield single


@dataclass(frozen=True, slots=True)
class _Made:
    """What a sample has made: vLLM's `RequestOutput`."""

    found: Any
    place: int
    spans: Spans
    """Of the sample so far."""


@dataclass(frozen=True, slots=True)
class _End:
    """A sample is over."""

    error: BaseException | None


def _end(results: "asyncio.Queue[_Made | _End]", task: "asyncio.Task[None]") -> None:
    results.put_nowait(_End(EngineError("the request was ended") if task.cancelled() else task.exception()))


async def _joined(
    results: "asyncio.Queue[_Made | _End]", samples: int, told: Told, *, whole: bool
) -> AsyncGenerator[Any, None]:
    """What the samples make, until all are over: as it comes, or as one if `whole`.

    `told` learns of it when it goes out, not when it was made: a client may be slow.
    """
    made: list[Any] = []
    while samples:
        result = await results.get()
        if isinstance(result, _Made):
            told.spans[result.place] = result.spans
            told.version = result.spans[-1][0]
            if whole:
                made.append(result.found)
            else:
                yield result.found
        elif result.error is None:
            samples -= 1
        else:
            raise result.error
    if made:
        told.version = max(spans[-1][0] for spans in told.spans.values())
        made[0].outputs = sorted((its.outputs[0] for its in made), key=lambda output: output.index)
        yield made[0]
