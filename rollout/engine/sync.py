"""The engine's side of a sync: receive, commit, finalize or abort, and the requests meanwhile (engine process)."""

import asyncio
import contextlib
from collections.abc import Coroutine
from enum import Enum
from typing import Any

import msgspec

from rollcast.comm.report import WorkerReport
from rollcast.rollout.engine.async_llm import LLMControl
from rollcast.rollout.engine.requests import Requests, engine_error
from rollcast.rollout.engine.workers import Workers
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import JoinGroup, Receive, ReceiveResult


class WeightState(Enum):
    """State of an engine's weights.

    SERVING --receive--> RECEIVING --commit--> COMMITTED     (in place: the weights are partially updated at first)
                         RECEIVING --abort--> PARTIAL --receive--> RECEIVING
    SERVING --receive--> STAGED --commit--> COMMITTED        (shadow: the new weights wait in spare memory)
                         STAGED --abort--> SERVING
    COMMITTED --finalize--> SERVING                          (every engine and trainer has the version)
    COMMITTED --abort--> PARTIAL                             (the version may come again, with other weights)
    """

    SERVING = "serving"
    RECEIVING = "receiving"
    STAGED = "staged"
    COMMITTED = "committed"
    PARTIAL = "partially updated"


class EngineSync:
    """Takes one engine from one version of the weights to the next.

    Between `receive` and `finalize` no output leaves the engine, so that a version means the same weights wherever it
    is seen. (An engine alone releases outputs at `commit`: its reply travels ahead of them.) After a failure, requests
    are refused instead of served with weights that are partially updated, or that other engines lack.
    """

    def __init__(
        self, workers: Workers, requests: Requests, control: LLMControl, *, index: int, wake_for_sync: bool
    ) -> None:
        self._workers = workers
        self._requests = requests
        self._control = control
        self._index = index
        self._wake_for_sync = wake_for_sync
        self._state = WeightState.SERVING
        self._tokens: dict[str, int] = {}
        self._under_way: asyncio.Task[Any] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._received: Receive | None = None

    @property
    def busy(self) -> bool:
        """Whether a sync is under way."""
        under_way = self._under_way is not None and not self._under_way.done()
        return under_way or self._state in (WeightState.RECEIVING, WeightState.STAGED)

    async def prepare(self, manifest: bytes, kept: bytes) -> list[str]:
        """Compile the landing plan in every worker. Return the digest of each worker's plan."""
        await self._ensure_awake()
        return await self._workers.call("rollcast_prepare", manifest, kept, phase="prepare")

    async def join(self, request: JoinGroup) -> None:
        """Join the group of its lane with every worker."""
        if self._under_way is not None and not self._under_way.done():
            # A sync that failed: the group that it has still to leave must not be the new one.
            await asyncio.wait([self._under_way], timeout=request.timeout_s)
        await self._workers.call("rollcast_join", msgspec.msgpack.encode(request), phase="join")

    async def receive(self, request: Receive) -> list[WorkerReport]:
        """Receive new weights in all workers. Served after `commit` and `finalize`, or at once if `request.alone`."""
        try:
            self._check(request)
            self._under_way = asyncio.current_task()
            await self._ensure_awake()
            results = await self._receive(request)
            self._received = request
            if request.alone:
                await self.commit(request.version, timeout_s=request.timeout_s)
        except BaseException:
            # Without waiting: vLLM's scheduler may be blocked until workers that still receive have failed, too.
            self._run_in_background(self._workers.call("rollcast_leave", phase="abort"))
            raise
        return [WorkerReport(request.first_rank + rank, result.phases_s) for rank, result in enumerate(results)]

    async def commit(self, version: int, *, timeout_s: float) -> None:
        """Switch to the received weights, clear caches if asked to, set the version, resume."""
        request = self._received
        assert request is not None and request.version == version
        self._raise_if_aborted(version)
        self._under_way = asyncio.current_task()
        if self._state is WeightState.STAGED:
            await self._change_weights(request, "apply", phase="commit", timeout_s=timeout_s)
        recompute = request.options.kv_cache == "recomputed"
        if recompute and not await self._control.clear_prefix_cache():
            raise engine_error(self._index, "could not clear vLLM's prefix cache")
        self._raise_if_aborted(version)
        self._requests.advance(version, self._tokens, resend_waiting=not recompute)
        self._state, self._received = WeightState.COMMITTED, None
        if request.alone:
            self._requests.release()
        if not self._control.asleep:
            # Asleep, vLLM schedules again when its cache is awake, too, and empty.
            await self._control.resume()

    def finalize(self) -> None:
        """Release the outputs of the new version: every engine has committed."""
        if self._state is WeightState.COMMITTED:
            self._state = WeightState.SERVING
            self._requests.release()

    async def abort(self, reason: str) -> None:
        """Give up the sync, which failed somewhere: serve on if the weights are untouched, else refuse to."""
        untouched = (WeightState.SERVING, WeightState.STAGED)
        if self._under_way is not None and not self._under_way.done() and self._state in untouched:
            # Still pausing, or receiving into spare memory: it must not continue after this.
            self._under_way.cancel()
            await asyncio.wait([self._under_way])
        if self._state in untouched:
            self._state = WeightState.SERVING
            self._requests.release()
            await self._control.resume()
            return
        if self._state is WeightState.PARTIAL:
            # The sync did not get as far as this engine, which has its reason from an earlier one.
            return
        weights = "weights of an aborted sync" if self._state is WeightState.COMMITTED else "partially updated weights"
        self._state = WeightState.PARTIAL
        # Later requests must not reuse KV blocks of these weights.
        self._requests.change_salt()
        self._requests.refuse(f"has {weights} and refuses to generate until the next sync: {reason}")

    def discard_weights(self, why: str) -> None:
        """Refuse requests until the next sync, because the weights are gone."""
        self._state = WeightState.PARTIAL
        self._requests.refuse(why)

    def _check(self, request: Receive) -> None:
        version, state, unchanged = self._requests.version, self._state, request.options.unchanged
        # The same version is accepted once more: the trainer may not know that it has arrived.
        if request.version < version:
            raise engine_error(self._index, f"has version {version}: {request.version} is not newer")
        if unchanged and (state is not WeightState.SERVING or request.version != version):
            raise engine_error(
                self._index,
                f"has version {version}, {state.value}: a self-test needs engines that serve version "
                f"{request.version}, so sync first",
            )
        if unchanged and self._requests.slots:
            raise engine_error(self._index, "has no adapter in its checkpoint to test: use sync(verify='full')")

    async def _receive(self, request: Receive) -> list[ReceiveResult]:
        """Receive into the live weights, or into spare memory while the workers decode. Return each worker's result."""
        options = request.options
        arguments: dict[str, Any] = {
            "version": request.version,
            "digests": request.digests,
            "slot": self._requests.slot_of(request.version),
            "verify": options.verify,
            "timeout_s": request.timeout_s,
        }
        # With partially updated weights there are no requests to decode for meanwhile.
        if options.mode == "shadow" and self._state is not WeightState.PARTIAL:
            results = await self._workers.call_directly("receive_shadow", phase="receive", **arguments)
            self._state = WeightState.STAGED
            return results
        arguments["unchanged"] = options.unchanged
        return await self._change_weights(request, "receive", phase="receive", **arguments)

    async def _change_weights(
        self, request: Receive, method: str, *, phase: str, timeout_s: float, **arguments: Any
    ) -> list[ReceiveResult]:
        """Call a method that changes the live weights in every worker. Return each worker's result.

        The workers run it between two steps and start none meanwhile, and its GPU work is queued behind that of the
        step under way. So requests continue without a pause; their outputs are held from here on.
        """
        self._requests.hold()
        self._requests.change_salt()
        try:
            # The prefix cache can only be cleared while nothing is scheduled.
            if request.options.pause_mode != "keep" or request.options.kv_cache == "recomputed":
                await self._pause(request.options.pause_mode, timeout_s=timeout_s)
            self._state = WeightState.RECEIVING
            results = await self._workers.call_directly(method, phase=phase, timeout_s=timeout_s, **arguments)
        except TimeoutError as error:
            raise engine_error(self._index, str(error)) from None
        except EngineError:
            # Steps must not continue with partially updated weights.
            self._run_in_background(self._control.pause("keep", timeout_s=timeout_s))
            raise
        self._tokens = results[0].tokens
        return results

    async def _pause(self, mode: str, *, timeout_s: float) -> None:
        """Stop scheduling. "abort" preempts the pool's requests; vLLM's own "abort" mode would end all requests."""
        await self._control.pause("wait" if mode == "wait" else "keep", timeout_s=timeout_s)
        if mode == "abort":
            await self._requests.preempt_all()

    def _raise_if_aborted(self, version: int) -> None:
        if self._state is WeightState.PARTIAL:
            raise engine_error(self._index, f"cannot commit version {version}: the sync was aborted")

    async def _ensure_awake(self) -> None:
        """Wake the weights if they are asleep, or raise `EngineError` if the configuration is to refuse."""
        if "weights" not in self._control.asleep:
            return
        if not self._wake_for_sync:
            raise engine_error(
                self._index,
                "sleeps: its weights cannot be updated before pool.wake_up(['weights']) "
                "(sync_asleep='wake' does that by itself)",
            )
        await self._control.wake_up(["weights"])

    def _run_in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start work that nobody waits for. It may fail: the engine may be dead."""

        async def attempt() -> None:
            with contextlib.suppress(Exception):
                await work

        task = asyncio.create_task(attempt())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
