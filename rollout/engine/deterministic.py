"""Whole batches, one after the other: the same requests share the same steps in every run (engine process)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from rollcast.rollout.engine.async_llm import Scheduling
from rollcast.rollout.engine.requests import Running
from rollcast.rollout.protocol.sampling import Completion

PAUSE_S = 60.0
Act = Callable[[Running], Awaitable[list[Completion]]]


@dataclass(slots=True)
class _Batch:
    begun: "asyncio.Future[None]"
    requests: list[Running] = field(default_factory=list)
    over: set[str] = field(default_factory=set)
    another: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one more is over."""

    @property
    def sent(self) -> bool:
        """Whether vLLM has every sample of every request that is not over already."""
        return all(len(its.numbers) == its.sampling.n or its.request_id in self.over for its in self.requests)


class Batches:
    """For `RolloutConfig(deterministic=True)`. What a step computes may hang, in its last bits, on what else is in it.

    So a batch waits until it is complete and no other runs. Then all of it is given to vLLM while that schedules
    nothing, and goes on together. Everything runs on one event loop.
    """

    def __init__(self, scheduling: Scheduling) -> None:
        self._scheduling = scheduling
        self._turn = asyncio.Lock()
        self._batches: dict[str, _Batch] = {}

    async def take_part(self, name: str, request: Running, act: Act) -> list[Completion]:
        """Do `act(request)` when the batch has its turn. Raises what kept the batch from it."""
        if name not in self._batches:
            self._batches[name] = _Batch(asyncio.get_running_loop().create_future())
        batch = self._batches[name]
        batch.requests.append(request)
        try:
            await asyncio.shield(batch.begun)
            return await act(request)
        finally:
            batch.over.add(request.request_id)
            batch.another.set()

    async def run(self, name: str) -> None:
        """The batch is complete: let it run when it is its turn. Returns when it is over."""
        batch = self._batches[name]
        try:
            async with self._turn:
                # A sync that holds the scheduler lets it go itself.
                held = self._scheduling.paused
                if not held:
                    await self._scheduling.pause("keep", timeout_s=PAUSE_S)
                batch.begun.set_result(None)
                while not batch.sent:
                    await asyncio.sleep(0)
                if not held:
                    await self._scheduling.resume()
                while len(batch.over) < len(batch.requests):
                    batch.another.clear()
                    await batch.another.wait()
        except Exception as error:
            if not batch.begun.done():
                batch.begun.set_exception(error)
            raise
        finally:
            del self._batches[name]

    def abort(self, request_ids: Iterable[str] | None) -> None:
        """These requests, or all, end at once when they have their turn."""
        for batch in self._batches.values():
            for request in batch.requests:
                request.ended |= request_ids is None or request.request_id in request_ids
