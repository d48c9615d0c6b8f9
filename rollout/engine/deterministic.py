"""Whole batches, one after the other: the same requests share the same steps in every run (engine process)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from rollcast.rollout.engine.async_llm import LLMControl
from rollcast.rollout.engine.requests import PoolRequest
from rollcast.rollout.protocol.sampling import Completion

PAUSE_S = 60.0


@dataclass(slots=True)
class _Batch:
    started: "asyncio.Future[None]"
    requests: list[PoolRequest] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    one_finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def submitted(self) -> bool:
        """Whether vLLM has every sample of every request that is not finished already."""
        return all(
            len(request.numbers) == request.sampling.n or request.request_id in self.finished
            for request in self.requests
        )


class DeterministicBatches:
    """Runs batches for `RolloutConfig(deterministic=True)`.

    The last bits of what a step computes may depend on what else is in the step. So a batch waits until it is complete
    and no other runs; all of it is then given to vLLM while that schedules nothing, and starts together. Everything
    runs on one event loop.
    """

    def __init__(self, control: LLMControl) -> None:
        self._control = control
        self._turn = asyncio.Lock()
        self._batches: dict[str, _Batch] = {}

    async def generate(
        self, name: str, request: PoolRequest, sample: Callable[[PoolRequest], Awaitable[list[Completion]]]
    ) -> list[Completion]:
        """Return what `sample(request)` does, once batch `name` starts. Raises what kept the batch from starting."""
        if name not in self._batches:
            self._batches[name] = _Batch(asyncio.get_running_loop().create_future())
        batch = self._batches[name]
        batch.requests.append(request)
        try:
            await asyncio.shield(batch.started)
            return await sample(request)
        finally:
            batch.finished.add(request.request_id)
            batch.one_finished.set()

    async def run(self, name: str) -> None:
        """Run a batch, which is complete, after the earlier ones. Returns when all of its requests are finished."""
        batch = self._batches[name]
        try:
            async with self._turn:
                # A sync that has paused the scheduler resumes it itself.
                paused_by_sync = self._control.paused
                if not paused_by_sync:
                    await self._control.pause("keep", timeout_s=PAUSE_S)
                batch.started.set_result(None)
                while not batch.submitted:
                    await asyncio.sleep(0)
                if not paused_by_sync:
                    await self._control.resume()
                while len(batch.finished) < len(batch.requests):
                    batch.one_finished.clear()
                    await batch.one_finished.wait()
        except Exception as error:
            if not batch.started.done():
                batch.started.set_exception(error)
            raise
        finally:
            del self._batches[name]

    def abort(self, request_ids: Iterable[str] | None) -> None:
        """End these requests, or all if None, as soon as their batch starts."""
        for batch in self._batches.values():
            for request in batch.requests:
                request.aborted |= request_ids is None or request.request_id in request_ids
