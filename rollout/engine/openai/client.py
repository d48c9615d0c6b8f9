"""vLLM's engine client for vLLM's own server: its requests take part in syncs (engine process)."""

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
class ResponseVersions:
    """The policy versions of one HTTP response, as far as it has been generated."""

    spans: dict[int, Spans] = field(default_factory=dict)
    """Spans of each sample so far, by its index among the choices of the response."""
    version: int | None = None
    """Version of the newest token; in a stream, of what is sent next. None before the first token."""
    samples: int = 0
    """Number of samples that the response has asked for."""
    refusal: str = ""
    """Why the request was refused, if it was."""


# Set by the middleware for each HTTP request, filled by `VersionedClient`.
RESPONSE_VERSIONS: ContextVar[ResponseVersions | None] = ContextVar("response_versions", default=None)


class VersionedClient:
    """Stands between vLLM's server and its `AsyncLLM`, whose other methods it passes on.

    `generate` goes through `Requests`: outputs are held while weights change, continue under the new ones, and are
    refused when there are none. Each sample is a vLLM request of its own. `RESPONSE_VERSIONS` receives the versions.
    """

    def __init__(self, llm: Any, requests: Requests, *, refusal: Callable[[], EngineError | None]) -> None:
        self._llm = llm
        self._requests = requests
        self._refusal = refusal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def check_health(self) -> None:
        """Check as vLLM does; an engine that refuses to generate is not healthy, either."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._refusal():
            raise EngineDeadError
        await self._llm.check_health()

    def generate(
        self, prompt: Mapping[str, Any], sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Generate as `AsyncLLM.generate`, for a prompt in the form of vLLM's `EngineInput`.

        Raises `EngineError` if the engine refuses, `ValueError` for a prompt that is not text.
        """
        if not isinstance(prompt, Mapping) or prompt.get("type") != "token":
            # vLLM caches the encoder's output for an image by the image alone, whatever the weights were.
            raise ValueError("this server takes text only: for images vLLM would reuse the output of older weights")
        versions = RESPONSE_VERSIONS.get() or ResponseVersions()
        first, versions.samples = versions.samples, versions.samples + sampling_params.n
        return self._generate(prompt, sampling_params, request_id, versions, first, options)

    async def _generate(
        self,
        prompt: Mapping[str, Any],
        params: Any,
        request_id: str,
        versions: ResponseVersions,
        first: int,
        options: dict[str, Any],
    ) -> AsyncGenerator[Any, None]:
        results: asyncio.Queue[_Output | _End] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        for index, single in enumerate(_single_params(params)):
            sample = _Sample(prompt, single, index, first + index, options)
            tasks.append(task := asyncio.create_task(self._run(sample, results.put_nowait)))
            self._requests.admit(task)
            task.add_done_callback(partial(_put_end, results))
        try:
            async for output in _merge(results, len(tasks), versions, whole=_is_final_only(params)):
                output.request_id = request_id
                yield output
        except EngineError as error:
            versions.refusal = str(error)
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _run(self, sample: "_Sample", put: "Callable[[_Output], None]") -> None:
        """Run one sample until it finishes."""
        try:
            finished = False
            # Once more, if it is recalled before it has started.
            while not finished:
                finished = await self._run_once(sample, put)
        except asyncio.CancelledError:
            # By `Requests.refuse`, or because the client has gone.
            self._raise_if_refused()
            raise

    def _raise_if_refused(self) -> None:
        if refusal := self._refusal():
            raise refusal from None

    async def _run_once(self, sample: "_Sample", put: "Callable[[_Output], None]") -> bool:
        """Run one vLLM request for the sample. Return whether the sample is finished."""
        self._raise_if_refused()
        await self._requests.wait_released()
        # The engine may have fallen asleep meanwhile.
        self._raise_if_refused()
        finished = False
        outputs = self._requests.outputs(sample.prompt, sample.params, numbers=set(), **sample.options)
        async for output, number, switches in outputs:
            finished = output.finished
            (completion,) = output.outputs
            completion.index = sample.index
            sample.count += len(completion.token_ids)
            put(_Output(output, sample.choice, spans_of(switches, number, sample.count)))
        return finished


@dataclass(slots=True)
class _Sample:
    """One of the samples of a request."""

    prompt: Mapping[str, Any]
    params: Any
    index: int
    choice: int
    """Index among all samples of the response."""
    options: dict[str, Any]
    count: int = 0
    """Tokens so far."""


def _is_final_only(params: Any) -> bool:
    from vllm.sampling_params import RequestOutputKind

    return params.output_kind is RequestOutputKind.FINAL_ONLY


def _single_params(params: Any) -> Iterator[Any]:
    """Yield the parameters of each of `params.n` samples, with seeds as vLLM makes them."""
    for index in range(params.n):
        single = params.clone()
        single.n = 1
        if params.seed is not None:
            single.seed = params.seed + index
        yield single


@dataclass(frozen=True, slots=True)
class _Output:
    """vLLM's `RequestOutput` of one sample."""

    output: Any
    choice: int
    spans: Spans
    """Spans of the sample so far."""


@dataclass(frozen=True, slots=True)
class _End:
    """The end of one sample."""

    error: BaseException | None


def _put_end(results: "asyncio.Queue[_Output | _End]", task: "asyncio.Task[None]") -> None:
    results.put_nowait(_End(EngineError("the request was cancelled") if task.cancelled() else task.exception()))


async def _merge(
    results: "asyncio.Queue[_Output | _End]", samples: int, versions: ResponseVersions, *, whole: bool
) -> AsyncGenerator[Any, None]:
    """Yield the outputs of all samples as they come, or merged into one at the end if `whole`.

    `versions` is updated when an output is sent, not when it was generated: a client may be slow.
    """
    outputs: list[Any] = []
    while samples:
        result = await results.get()
        if isinstance(result, _Output):
            versions.spans[result.choice] = result.spans
            versions.version = result.spans[-1][0]
            if whole:
                outputs.append(result.output)
            else:
                yield result.output
        elif result.error is None:
            samples -= 1
        else:
            raise result.error
    if outputs:
        versions.version = max(spans[-1][0] for spans in versions.spans.values())
        completions = (output.outputs[0] for output in outputs)
        outputs[0].outputs = sorted(completions, key=lambda completion: completion.index)
        yield outputs[0]
