"""Requests to vLLM, and the policy versions that each is run under (engine process)."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rollcast.rollout.engine.samples import Draft, Switch
from rollcast.rollout.errors import EngineError
from rollcast.rollout.lora import adapter_request
from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling

# What vLLM makes of our request ids: a random end.
REQUEST_ID = re.compile(r"rollcast-(?P<number>\d+)(?:-|$)")
Emit = Callable[[Piece], None]


@dataclass(slots=True)
class Running:
    """One request of the pool's."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    priority: int
    emit: Emit | None
    """For a stream: called with each piece."""
    ended: bool = False
    """Somebody wants it to end with what it has."""
    numbers: set[int] = field(default_factory=set)
    """Of vLLM's requests for it."""


class Requests:
    """Samples from one `AsyncLLM`. Everything runs on one event loop.

    Each sample is a request of vLLM's. If a sync ends it (`pause_mode="abort"`), another request goes on from the
    tokens that it has, under the new weights.

    With `slots`, the weights of a version are an adapter in one of them, and versions take turns: a request stays
    with its slot, and goes over to another version when that is put there.
    """

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...], slots: int) -> None:
        self._llm = llm
        self._index = index
        self._eos_token_ids = eos_token_ids
        self._count = 0
        self._switch = Switch(0, {})
        self.slots = slots
        self._slot = 0
        # By vLLM's request: its slot, the switch that it arrived after, and those since that concern the slot.
        self._switches: dict[int, tuple[int, list[Switch]]] = {}
        self._running: dict[str, Running] = {}
        self._waiting: set[asyncio.Task[Any]] = set()
        self._guests: set[asyncio.Task[Any]] = set()
        # vLLM's requests whose outcome does not count.
        self._recalled: set[int] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._decided = asyncio.Event()
        self._decided.set()
        self.refusal = ""
        """Why nothing is served, if so."""
        self.salt = 0
        """Requests with different salts share no prefix cache."""

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._switch.version

    @property
    def count(self) -> int:
        """Of requests that are under way."""
        return len(self._running) + len(self._guests)

    def slot_of(self, version: int) -> int:
        """Where a version goes, or is."""
        return self._slot if version == self.version else (self._slot + 1) % max(self.slots, 1)

    def hold(self) -> None:
        """The weights change: what ends from now on may be of some that will not be served, and is kept back.

        What arrives is kept back, too: it must not begin before the change. Until `release`.
        """
        self._decided.clear()

    def release(self) -> None:
        """Hand out what was kept back."""
        self._decided.set()

    def advance(self, version: int, tokens: Mapping[str, int], *, anew: bool) -> None:
        """The engine is on `version`; `tokens` is how many each request, by vLLM's id, had before. `release` follows.

        With `anew`, requests that have not run yet are taken back and sent again: as they are, they would find keys
        that running ones have made with the old weights.
        """
        if version != self.version:
            self._slot = self.slot_of(version)
            found = ((REQUEST_ID.match(request), count) for request, count in tokens.items())
            places = ((int(its["number"]), count) for its, count in found if its)
            self._switch = Switch(version, {number: count for number, count in places if number in self._switches})
            concerned = {number: its for number, (slot, its) in self._switches.items() if slot == self._slot}
            for switches in concerned.values():
                switches.append(self._switch)
            if anew and (waiting := concerned.keys() - self._switch.tokens.keys()):
                self._recalled |= waiting
                self._calls.add(call := asyncio.create_task(self._abort(waiting)))
                call.add_done_callback(self._calls.discard)
        self.refusal = ""

    async def generate(self, request: Running) -> list[Completion]:
        """Sample `sampling.n` completions of the prompt, in order."""
        if request.request_id in self._running:
            raise EngineError(f"request {request.request_id!r} is under way already: give each an id of its own")
        self._running[request.request_id] = request
        tasks = [asyncio.create_task(self._sample(request, index)) for index in range(request.sampling.n)]
        self._waiting.update(tasks)
        try:
            group = await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            raise EngineError(self.refusal or f"engine {self._index} ended the request") from None
        finally:
            for task in tasks:
                task.cancel()
            self._waiting.difference_update(tasks)
            del self._running[request.request_id]
        # The first sample's: they have one prompt.
        shared: dict[str, Any] = {"prompt_logprobs": group[0].prompt_logprobs, "engine": self._index}
        return [msgspec.structs.replace(each, **shared) for each in group]

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests of the pool with what they have. Those that are not here are over already."""
        found = [self._running[request_id] for request_id in request_ids if request_id in self._running]
        for request in found:
            request.ended = True
        await self._abort(number for request in found for number in request.numbers)

    async def abort_all(self) -> None:
        """End every request, whoever has sent it, with what it has."""
        for request in self._running.values():
            request.ended = True
        await self._abort([*self._switches])

    async def set_aside(self) -> None:
        """Take the pool's requests out of vLLM. They go on from their tokens when the weights are decided on."""
        await self._abort([number for request in self._running.values() for number in request.numbers])

    async def _abort(self, numbers: Iterable[int]) -> None:
        await self._llm.abort([f"rollcast-{number}" for number in numbers])

    def refuse(self, why: str) -> None:
        """End every request, and serve none until `refusal` is empty again."""
        self.refusal = why
        for task in self._waiting | self._guests:
            task.cancel()

    def admit(self, guest: "asyncio.Task[Any]") -> None:
        """Count a request that is not the pool's, which follows one of vLLM's until it ends; `refuse` cancels it."""
        self._guests.add(guest)
        guest.add_done_callback(self._guests.discard)

    async def decided(self) -> None:
        """Wait until it is decided which weights are served."""
        await self._decided.wait()

    async def _sample(self, request: Running, index: int) -> Completion:
        draft = Draft(request.prompt, request.sampling, index)
        while draft.finish_reason is None:
            await self._decided.wait()
            if request.ended:
                draft.finish_reason = "abort"
                if request.emit is not None:
                    request.emit(Piece([], [], (), "abort"))
            else:
                await self._extend(request, draft)
        return draft.completion()

    async def _extend(self, request: Running, draft: Draft) -> None:
        """Run the sample until it ends, or a sync ends it."""
        from vllm.inputs.engine import tokens_input

        draft.begin()
        # In vLLM's own form, which it takes at once: a request must not meet a switch on its way in.
        tokens = tokens_input(draft.prompt + draft.token_ids)
        params = draft.params(eos_token_ids=self._eos_token_ids, stream=request.emit is not None)
        following = self.follow(tokens, params, numbers=request.numbers, priority=request.priority)
        async with contextlib.aclosing(following):
            async for found, number, switches in following:
                (output,) = found.outputs
                piece = draft.take(output, number, switches, ended=request.ended)
                draft.take_prompt(found)
                if request.emit is not None and (piece.token_ids or piece.finish_reason):
                    request.emit(piece)

    async def follow(
        self, prompt: Mapping[str, Any], params: Any, *, numbers: set[int], **more: Any
    ) -> AsyncGenerator[tuple[Any, int, Sequence[Switch]], None]:
        """What one request of vLLM's makes, handed out when the weights are decided on; its number, its switches.

        Ends without a last output if the request is taken back: then it is to be sent again. Its number is in
        `numbers` meanwhile. `prompt` is vLLM's `EngineInput`; `more` is for `AsyncLLM.generate`.
        """
        self._count += 1
        number = self._count
        numbers.add(number)
        slot, switches = self._switches[number] = self._slot, [self._switch]
        salts = (f"rollcast-{self.salt}", prompt.get("cache_salt"))
        salted = {**prompt, "cache_salt": "-".join(filter(None, salts))}
        if self.slots:
            more["lora_request"] = adapter_request(slot)
        try:
            async for found in self._llm.generate(salted, params, f"rollcast-{number}", **more):
                await self._decided.wait()
                # Taken back, it may have run by now, with keys of the old weights.
                if number not in self._recalled:
                    yield found, number, switches
        finally:
            del self._switches[number]
            self._recalled.discard(number)
            numbers.discard(number)
