"""Syncs of one engine: what is done with new weights, and what happens to requests meanwhile (engine process)."""

import asyncio
import contextlib
from collections.abc import Coroutine
from enum import Enum
from typing import Any

import msgspec

from rollcast.rollout.engine.async_llm import Scheduling
from rollcast.rollout.engine.requests import Requests
from rollcast.rollout.engine.workers import Workers
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import JoinGroup, Receive, WorkerTimes


class State(Enum):
    """Of an engine's weights.

    SERVING --receive--> RECEIVING --commit--> COMMITTED     (in place: the weights are a mixture at first)
                         RECEIVING --abandon--> TORN --receive--> RECEIVING
    SERVING --receive--> HOLDING --commit--> COMMITTED       (shadow: the new weights wait beside the old)
                         HOLDING --abandon--> SERVING
    COMMITTED --settle--> SERVING                            (everybody has the version)
    COMMITTED --abandon--> TORN                              (given up: it may come again, with other weights)
    """

    SERVING = "serving"
    RECEIVING = "receiving"
    HOLDING = "holding"
    COMMITTED = "committed"
    TORN = "torn"


class Updates:
    """Takes an engine from one version to the next.

    Between `receive` and `settle` nothing is handed out, so that a version is of the same weights wherever it is seen.
    (An engine alone hands out from `commit` on: its answer travels ahead of what it makes.) After a failure requests
    are refused instead of served with weights that are torn, or not everybody's.
    """

    def __init__(
        self, workers: Workers, requests: Requests, scheduling: Scheduling, *, index: int, wakes: bool
    ) -> None:
        self._workers = workers
        self._requests = requests
        self._scheduling = scheduling
        self._index = index
        self._wakes = wakes
        self._state = State.SERVING
        self._tokens: dict[str, int] = {}
        self._changing: asyncio.Task[Any] | None = None
        self._attempts: set[asyncio.Task[None]] = set()
        self._received: Receive | None = None

    async def prepare(self, manifest: bytes) -> list[str]:
        """Let every worker find where the parameters land. The digest of each worker's plan."""
        await self.wake()
        return await self._workers.call("rollcast_prepare", manifest)

    async def join(self, request: JoinGroup) -> None:
        """Let every worker join the group of its lane."""
        if self._changing is not None and not self._changing.done():
            # Of a sync that failed: what it still has to leave must not be the new group.
            await asyncio.wait([self._changing], timeout=request.timeout_s)
        assignments = [list(msgspec.structs.astuple(assignment)) for assignment in request.assignments]
        arguments = (request.address, assignments, request.walk, request.bucket_bytes, request.timeout_s)
        await self._workers.call("rollcast_join", *arguments)

    async def receive(self, request: Receive) -> list[WorkerTimes]:
        """Receive new weights in all workers. Served after `commit` and `settle`, or at once if `request.alone`."""
        try:
            self._check(request)
            self._changing = asyncio.current_task()
            await self.wake()
            phases = await self._receive(request)
            self._received = request
            if request.alone:
                await self.commit(request.version, timeout_s=request.timeout_s)
        except BaseException:
            # vLLM may be held up by workers that still receive, until the sender hears of this.
            self._in_time(self._workers.call("rollcast_leave"))
            raise
        return [WorkerTimes(request.first_rank + rank, worker) for rank, worker in enumerate(phases)]

    def _in_time(self, act: Coroutine[Any, Any, Any]) -> None:
        """Do something that need not be waited for. An engine that is dead does nothing."""

        async def attempt() -> None:
            with contextlib.suppress(Exception):
                await act

        task = asyncio.create_task(attempt())
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)

    def _check(self, request: Receive) -> None:
        version, state = self._requests.version, self._state
        # The same version once more: the trainer has not heard that it has arrived.
        if request.version < version:
            raise EngineError(f"engine {self._index} has version {version}: {request.version} is not newer")
        if request.unchanged and (state is not State.SERVING or request.version != version):
            raise EngineError(
                f"engine {self._index} has version {version}, {state.value}: a self-test needs engines that serve "
                f"version {request.version}, so sync first"
            )
        if request.unchanged and self._requests.slots:
            raise EngineError(f"engine {self._index} has no adapter in its checkpoint to test: use sync(verify='full')")

    async def _receive(self, request: Receive) -> list[dict[str, float]]:
        """Let the workers receive: into the live weights, torn until `commit`, or beside them while they decode."""
        slot = self._requests.slot_of(request.version)
        arguments: list[Any] = [request.version, request.digests, slot, request.verify]
        # Torn, there is nothing to serve meanwhile.
        if request.mode == "shadow" and self._state is not State.TORN:
            outcomes = await self._workers.ring("rollcast_receive_aside", *arguments, request.timeout_s)
            self._state = State.HOLDING
        else:
            arguments += [request.unchanged, request.timeout_s]
            outcomes = await self._change("rollcast_receive", *arguments, request=request, timeout_s=request.timeout_s)
        return [outcome["phases_s"] for outcome in outcomes]

    async def _change(self, method: str, *arguments: Any, request: Receive, timeout_s: float) -> list[Any]:
        """Make a call that changes the live weights; what it returns.

        It is made between two steps of the workers, which make none meanwhile, and its GPU work is queued behind
        that of the step under way. So requests need no pause to be kept; what ends from here on is held.
        """
        self._requests.hold()
        if request.prefix_cache == "salt":
            # Requests that arrive from now on, which run under the next version.
            self._requests.salt += 1
        try:
            # A cache is cleared while nothing runs.
            if request.pause_mode != "keep" or _clears(request):
                await self._pause(request.pause_mode, timeout_s=timeout_s)
            self._state = State.RECEIVING
            outcomes = await self._workers.ring(method, *arguments)
        except TimeoutError as late:
            raise EngineError(f"engine {self._index} {late}") from None
        except EngineError:
            # Torn weights must not go on to run.
            self._in_time(self._scheduling.pause("keep", timeout_s=timeout_s))
            raise
        self._tokens = outcomes[0]["tokens"]
        return outcomes

    async def _pause(self, mode: str, *, timeout_s: float) -> None:
        """Let vLLM schedule nothing more. "abort" is not vLLM's own, which would also end what is not the pool's."""
        await self._scheduling.pause("wait" if mode == "wait" else "keep", timeout_s=timeout_s)
        if mode == "abort":
            await self._requests.set_aside()

    async def commit(self, version: int, *, timeout_s: float) -> None:
        """All engines have the weights: switch to them, treat the prefix cache, set the version, go on."""
        request = self._received
        assert request is not None and request.version == version
        self._raise_if_given_up(version)
        self._changing = asyncio.current_task()
        if self._state is State.HOLDING:
            await self._change("rollcast_apply", timeout_s, request=request, timeout_s=timeout_s)
        if _clears(request) and not await self._scheduling.clear_prefix_cache():
            raise EngineError(f"engine {self._index}: vLLM did not clear its prefix cache")
        self._raise_if_given_up(version)
        anew = request.prefix_cache == "salt" and not _clears(request)
        self._requests.advance(version, self._tokens, anew=anew)
        self._state, self._received = State.COMMITTED, None
        if request.alone:
            self._requests.release()
        if not self._scheduling.asleep:
            # Asleep, vLLM schedules again when its cache is awake, too, and empty.
            await self._scheduling.resume()

    def _raise_if_given_up(self, version: int) -> None:
        if self._state is State.TORN:
            raise EngineError(f"engine {self._index}: the sync of version {version} was given up meanwhile")

    def settle(self) -> None:
        """All engines have committed: hand out what the version makes."""
        if self._state is State.COMMITTED:
            self._state = State.SERVING
            self._requests.release()

    async def abandon(self, text: str) -> None:
        """The sync failed somewhere. Untouched weights serve on; torn ones, or those of this sync, never do."""
        if self._changing is not None and not self._changing.done() and self._state in (State.SERVING, State.HOLDING):
            # Still pausing, or receiving beside: it must not go on after this.
            self._changing.cancel()
            await asyncio.wait([self._changing])
        if self._state in (State.SERVING, State.HOLDING):
            self._state = State.SERVING
            self._requests.release()
            await self._scheduling.resume()
            return
        if self._state is State.TORN:
            # It did not come as far as this engine, which has said before why it refuses.
            return
        held = "weights that were given up" if self._state is State.COMMITTED else "torn weights"
        self._state = State.TORN
        # Nobody may find the keys that these weights have made.
        self._requests.salt += 1
        self._requests.refuse(f"engine {self._index} holds {held} and refuses to generate until the next sync: {text}")

    @property
    def busy(self) -> bool:
        """Whether a sync is under way."""
        changing = self._changing is not None and not self._changing.done()
        return changing or self._state in (State.RECEIVING, State.HOLDING)

    async def wake(self) -> None:
        """See to it that there are weights to write, or refuse."""
        if "weights" not in self._scheduling.asleep:
            return
        if not self._wakes:
            raise EngineError(
                f"engine {self._index} sleeps: its weights cannot be updated before pool.wake_up(['weights']) "
                "(sync_asleep='wake' does that by itself)"
            )
        await self._scheduling.wake_up(["weights"])

    def lose(self, why: str) -> None:
        """The weights are gone: serve nothing before the next sync."""
        self._state = State.TORN
        self._requests.refuse(why)


def _clears(request: Receive) -> bool:
    """Whether keys and values of the old weights go, also those of requests in flight."""
    return request.prefix_cache == "clear" or request.kv_cache == "recomputed"
