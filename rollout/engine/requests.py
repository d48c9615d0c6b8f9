"""Requests to vLLM, and the policy versions that each of them runs under (engine process)."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rollcast.rollout.engine.samples import SampleState, Switch
from rollcast.rollout.errors import EngineError, Failure
from rollcast.rollout.lora import adapter_request
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling

# vLLM appends a random suffix to our request ids.
REQUEST_ID = re.compile(r"rollcast-(?P<number>\d+)(?:-|$)")


def engine_error(engine: int, text: str) -> EngineError:
    """Return an error about the engine as a whole: "engine 0 sleeps: ..." for the text "sleeps: ..."."""
    return EngineError(f"engine {engine} {text}", failures=[Failure(text=text, engine=engine)])


@dataclass(slots=True)
class PoolRequest:
    """One request from a trainer's pool."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    priority: int
    emit: Callable[[Piece], None] | None
    """Called with each piece of a stream; None: no stream."""
    aborted: bool = False
    """The request is to end with the tokens it has."""
    numbers: set[int] = field(default_factory=set)
    """Numbers of the vLLM requests that run for it."""


class Requests:
    """Samples from one `AsyncLLM`. Everything runs on one event loop.

    Each sample is a request to vLLM. If a sync preempts it (`pause_mode="abort"`), another vLLM request continues from
    its tokens, under the new weights.

    With LoRA `slots`, the weights of a version are an adapter in one of the slots, which versions fill in turn: a
    request keeps its slot, and switches to another version when that is put there.
    """

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...], slots: int) -> None:
        self._llm = llm
        self._index = index
        self._eos_token_ids = eos_token_ids
        self._count = 0
        self._switch = Switch(0, {})
        self.slots = slots
        self._slot = 0
        # vLLM request number -> (LoRA slot, version switches that affect it; the first is the one it started under).
        self._switches: dict[int, tuple[int, list[Switch]]] = {}
        self._pool_requests: dict[str, PoolRequest] = {}
        self._sample_tasks: set[asyncio.Task[Any]] = set()
        self._server_tasks: set[asyncio.Task[Any]] = set()
        # Numbers of vLLM requests whose outputs are dropped, because they are sent again.
        self._recalled: set[int] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()
        self._released.set()
        self._refusal = ""
        self._salt = 0

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._switch.version

    @property
    def count(self) -> int:
        """Number of requests in flight."""
        return len(self._pool_requests) + len(self._server_tasks)

    @property
    def refusal(self) -> EngineError | None:
        """The error of every request until the next sync, if the engine refuses to generate."""
        return engine_error(self._index, self._refusal) if self._refusal else None

    def slot_of(self, version: int) -> int:
        """Return the LoRA slot of the current version, or the one that a new version will fill."""
        return self._slot if version == self.version else (self._slot + 1) % max(self.slots, 1)

    def hold(self) -> None:
        """Hold back outputs and new requests until `release`, while the weights change.

        An output may be from weights that will never be served, and a new request must not start before the change.
        """
        self._released.clear()

    def release(self) -> None:
        """Let outputs and new requests pass again."""
        self._released.set()

    def change_salt(self) -> None:
        """Take a new cache_salt: requests sent from here on must not reuse KV blocks of the old weights."""
        self._salt += 1

    def advance(self, version: int, tokens: Mapping[str, int], *, resend_waiting: bool) -> None:
        """Note that the engine has switched to `version`. `release` follows.

        `tokens` maps vLLM's request ids to their output tokens from before the switch. With `resend_waiting`, requests
        that have not run yet are aborted and sent again: as they are, they would find KV blocks that running requests
        have computed with the old weights.
        """
        if version != self.version:
            self._slot = self.slot_of(version)
            matches = ((REQUEST_ID.match(request), count) for request, count in tokens.items())
            counts = {int(match["number"]): count for match, count in matches if match}
            self._switch = Switch(version, {number: counts[number] for number in counts.keys() & self._switches.keys()})
            affected = {number: switches for number, (slot, switches) in self._switches.items() if slot == self._slot}
            for switches in affected.values():
                switches.append(self._switch)
            if resend_waiting and (waiting := affected.keys() - self._switch.tokens.keys()):
                self._recalled |= waiting
                self._aborts.add(task := asyncio.create_task(self._abort(waiting)))
                task.add_done_callback(self._aborts.discard)
        self._refusal = ""

    async def generate(self, request: PoolRequest) -> list[Completion]:
        """Sample `sampling.n` completions of the prompt, in order."""
        if request.request_id in self._pool_requests:
            raise ValueError(f"request {request.request_id!r} is in flight already: give each request its own id")
        self._pool_requests[request.request_id] = request
        tasks = [asyncio.create_task(self._sample(request, index)) for index in range(request.sampling.n)]
        self._sample_tasks.update(tasks)
        try:
            group = await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            raise (self.refusal or engine_error(self._index, "ended the request")) from None
        finally:
            for task in tasks:
                task.cancel()
            self._sample_tasks.difference_update(tasks)
            del self._pool_requests[request.request_id]
        # All samples share the prompt, whose log-probabilities the first one carries.
        shared: dict[str, Any] = {"prompt_logprobs": group[0].prompt_logprobs, "engine": self._index}
        return [msgspec.structs.replace(each, **shared) for each in group]

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests of the pool with the tokens they have. Unknown ids are of finished requests."""
        ids = [request_id for request_id in request_ids if request_id in self._pool_requests]
        requests = [self._pool_requests[request_id] for request_id in ids]
        for request in requests:
            request.aborted = True
        await self._abort(number for request in requests for number in request.numbers)

    async def abort_all(self) -> None:
        """End every request, of the pool and of the engine's own server, with the tokens it has."""
        for request in self._pool_requests.values():
            request.aborted = True
        await self._abort([*self._switches])

    async def preempt_all(self) -> None:
        """Abort the pool's requests in vLLM. After `release` they continue from their tokens."""
        await self._abort([number for request in self._pool_requests.values() for number in request.numbers])

    async def _abort(self, numbers: Iterable[int]) -> None:
        await self._llm.abort([f"rollcast-{number}" for number in numbers])

    def refuse(self, why: str) -> None:
        """Fail every request with "engine 0 `why`", and all later ones until `advance`."""
        self._refusal = why
        for task in self._sample_tasks | self._server_tasks:
            task.cancel()

    def admit(self, task: "asyncio.Task[Any]") -> None:
        """Count a task that generates one sample for the engine's own server. `refuse` cancels it."""
        self._server_tasks.add(task)
        task.add_done_callback(self._server_tasks.discard)

    async def wait_released(self) -> None:
        """Wait until requests may start."""
        await self._released.wait()

    async def _sample(self, request: PoolRequest, index: int) -> Completion:
        sample = SampleState(request.prompt, request.sampling, index)
        while sample.finish_reason is None:
            await self._released.wait()
            if request.aborted:
                sample.finish_reason = "abort"
                if request.emit is not None:
                    request.emit(Piece([], [], (), "abort"))
            else:
                await self._extend(request, sample)
        return sample.completion()

    async def _extend(self, request: PoolRequest, sample: SampleState) -> None:
        """Run one vLLM request for the sample, until it finishes or a sync preempts it."""
        from vllm.inputs.engine import tokens_input

        sample.begin()
        # vLLM takes its own form of input at once: a switch must not happen while a request is on its way in.
        tokens = tokens_input(sample.prompt + sample.token_ids)
        params = sample.params(eos_token_ids=self._eos_token_ids, stream=request.emit is not None)
        outputs = self.outputs(tokens, params, numbers=request.numbers, priority=request.priority)
        async with contextlib.aclosing(outputs):
            async for output, number, switches in outputs:
                (completion,) = output.outputs
                piece = sample.take(completion, number, switches, aborted=request.aborted)
                sample.take_prompt(output)
                if request.emit is not None and (piece.token_ids or piece.finish_reason):
                    request.emit(piece)

    async def outputs(
        self, prompt: Mapping[str, Any], params: Any, *, numbers: set[int], **options: Any
    ) -> AsyncGenerator[tuple[Any, int, Sequence[Switch]], None]:
        """Run one vLLM request. Yield each `RequestOutput`, once released, with the request's number and switches.

        Ends without a final output if the request is recalled: it must be sent again. Its number is in `numbers`
        meanwhile. `prompt` is vLLM's `EngineInput`; `options` are for `AsyncLLM.generate`.
        """
        self._count += 1
        number = self._count
        numbers.add(number)
        slot, switches = self._switches[number] = self._slot, [self._switch]
        salts = (f"rollcast-{self._salt}", prompt.get("cache_salt"))
        salted = {**prompt, "cache_salt": "-".join(filter(None, salts))}
        if self.slots:
            options["lora_request"] = adapter_request(slot)
        try:
            async for output in self._llm.generate(salted, params, f"rollcast-{number}", **options):
                await self._released.wait()
                # A recalled request may have run by now, with KV blocks of the old weights.
                if number not in self._recalled:
                    yield output, number, switches
        finally:
            del self._switches[number]
            self._recalled.discard(number)
            numbers.discard(number)
