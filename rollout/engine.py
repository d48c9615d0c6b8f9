"""One vLLM engine: generate, and take part in a sync (engine process)."""

import asyncio
import contextlib
import re
from collections.abc import Coroutine
from enum import Enum
from typing import Any

import msgspec

from rollcast.rollout.bells import Bells
from rollcast.rollout.errors import EngineError
from rollcast.rollout.records import Completion, JoinGroup, Launch, Receive, Sampling, WorkerTimes
from rollcast.rollout.replies import named
from rollcast.rollout.requests import Requests
from rollcast.rollout.scheduling import Scheduling
from rollcast.rollout.starting import start_llm

# What vLLM wraps around a worker's own text.
VLLM_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (Worker failed with error )?|, please check the stack trace above for the root cause$"
)


class State(Enum):
    """Of an engine's weights.

    SERVING --receive--> RECEIVING --commit--> SERVING       (in place: the weights are a mixture at first)
                         RECEIVING --abandon--> TORN --receive--> RECEIVING
    SERVING --receive--> HOLDING --commit--> SERVING         (shadow: the new weights wait beside the old)
                         HOLDING --abandon--> SERVING
    """

    SERVING = "serving"
    RECEIVING = "receiving"
    HOLDING = "holding"
    TORN = "torn"


class Engine:
    """Wraps `AsyncLLM` and knows which policy version its weights are.

    Everything runs on one event loop. Between `receive` and `commit` nothing is handed out; after a failure vLLM is
    paused and requests are refused instead of served with torn weights.
    """

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...], workers: int) -> None:
        self._llm = llm
        self._workers = workers
        self._index = index
        self._requests = Requests(llm, index=index, eos_token_ids=eos_token_ids)
        self._scheduling = Scheduling(llm)
        self._state = State.SERVING
        self._tokens: dict[str, int] = {}
        self._asleep: frozenset[str] = frozenset()
        self._changing: asyncio.Task[Any] | None = None
        self._attempts: set[asyncio.Task[None]] = set()
        self._received: Receive | None = None
        self._bells = Bells(workers)

    @classmethod
    def start(cls, launch: Launch) -> "Engine":
        """Start vLLM's processes and load the model. Blocks until the engine is ready."""
        its: dict[str, Any] = {"index": launch.engine, "eos_token_ids": launch.eos_token_ids}
        return cls(start_llm(launch), workers=launch.tensor_parallel_size, **its)

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._requests.version

    @property
    def torn(self) -> str | None:
        """Why it refuses to generate, if so."""
        return self._requests.refusal or None

    @property
    def dead(self) -> bool:
        """Whether vLLM has given up."""
        return self._llm.errored

    async def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt; groups in the order of the prompts."""
        if self._asleep:
            raise EngineError(f"engine {self._index} sleeps: call pool.wake_up() first")
        return await self._requests.generate(prompts, sampling)

    async def watch(self) -> None:
        """Let the workers count tokens from the first request on."""
        await self.call("rollcast_watch", await self._bells.open(), self._workers)
        # vLLM asks its processes the first time; later requests then go in without a wait.
        await self._llm.get_supported_tasks()

    async def prepare(self, manifest: bytes) -> list[str]:
        """Let every worker find where the parameters land. The digest of each worker's plan."""
        self._refuse_asleep()
        return await self.call("rollcast_prepare", manifest)

    async def join(self, request: JoinGroup) -> None:
        """Let every worker join the group of its lane."""
        if self._changing is not None and not self._changing.done():
            # Of a sync that failed: what it still has to leave must not be the new group.
            await asyncio.wait([self._changing], timeout=request.timeout_s)
        assignments = [list(msgspec.structs.astuple(assignment)) for assignment in request.assignments]
        arguments = (request.address, assignments, request.walk, request.bucket_bytes, request.timeout_s)
        await self.call("rollcast_join", *arguments)

    async def receive(self, request: Receive) -> list[WorkerTimes]:
        """Receive new weights in all workers. Served when `commit` is called, or at once if `request.alone`."""
        try:
            self._check(request)
            self._changing = asyncio.current_task()
            phases = await self._receive(request)
            self._received = request
            if request.alone:
                await self.commit(request.version, timeout_s=request.timeout_s)
        except BaseException:
            # vLLM may be held up by workers that still receive, until the sender hears of this.
            self._in_time(self.call("rollcast_leave"))
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
        # The same version once more: the trainer has not heard that it has arrived.
        if request.version < self.version:
            raise EngineError(f"engine {self._index} has version {self.version}: {request.version} is not newer")
        if request.unchanged and (self._state is not State.SERVING or request.version != self.version):
            raise EngineError(
                f"engine {self._index} has version {self.version}, {self._state.value}: a self-test needs engines that "
                f"serve version {request.version}, so sync first"
            )
        self._refuse_asleep()
        if request.mode == "shadow" and self._state is State.TORN:
            raise EngineError(f"engine {self._index} has no weights to serve meanwhile: sync in place after a failure")

    async def _receive(self, request: Receive) -> list[dict[str, float]]:
        """Let the workers receive: into the live weights, torn until `commit`, or beside them while they decode."""
        arguments: list[Any] = [request.version, request.digests, request.verify]
        if request.mode == "shadow":
            outcomes = await self._ring("rollcast_receive_aside", *arguments, request.timeout_s)
            self._state = State.HOLDING
        else:
            arguments += [request.unchanged, request.timeout_s]
            outcomes = await self._change("rollcast_receive", *arguments, request=request, timeout_s=request.timeout_s)
        return [outcome["phases_s"] for outcome in outcomes]

    async def _change(self, method: str, *arguments: Any, request: Receive, timeout_s: float) -> list[Any]:
        """Make a call that changes the live weights; what it returns.

        It is made between two steps of the workers, which make none meanwhile, and its GPU work is queued behind
        that of the step under way. So requests need no pause to be kept; what ends from here on is held until
        `commit`.
        """
        self._requests.hold()
        if request.prefix_cache == "salt":
            # Requests that arrive from now on, which run under the next version.
            self._requests.salt += 1
        try:
            # A cache is cleared while nothing runs.
            if request.pause_mode != "keep" or request.prefix_cache == "clear":
                await self._scheduling.pause(request.pause_mode, timeout_s=timeout_s)
            self._state = State.RECEIVING
            outcomes = await self._ring(method, *arguments)
        except TimeoutError as late:
            raise EngineError(f"engine {self._index} {late}") from None
        except EngineError:
            # Torn weights must not go on to run.
            self._in_time(self._scheduling.pause("keep", timeout_s=timeout_s))
            raise
        self._tokens = outcomes[0]["tokens"]
        return outcomes

    def _refuse_asleep(self) -> None:
        if "weights" in self._asleep:
            raise EngineError(f"engine {self._index} sleeps: its weights cannot be updated before wake_up")

    async def commit(self, version: int, *, timeout_s: float) -> None:
        """All engines have the weights: switch to them, treat the prefix cache, set the version, resume."""
        request = self._received
        assert request is not None and request.version == version
        self._changing = asyncio.current_task()
        if self._state is State.HOLDING:
            await self._change("rollcast_apply", timeout_s, request=request, timeout_s=timeout_s)
        if request.prefix_cache == "clear" and not await self._scheduling.clear_prefix_cache():
            raise EngineError(f"engine {self._index}: vLLM did not clear its prefix cache")
        self._requests.advance(version, self._tokens)
        self._state, self._received = State.SERVING, None
        if not self._asleep:
            # Asleep, vLLM schedules again when its cache is awake, too, and empty.
            await self._scheduling.resume()

    async def abandon(self, text: str) -> None:
        """The sync failed somewhere. Untouched weights serve on; torn ones never do."""
        if self._changing is not None and not self._changing.done() and self._state in (State.SERVING, State.HOLDING):
            # Still pausing, or receiving beside: it must not go on after this.
            self._changing.cancel()
            await asyncio.wait([self._changing])
        if self._state in (State.SERVING, State.HOLDING):
            self._state = State.SERVING
            self._requests.release()
            await self._scheduling.resume()
            return
        self._state = State.TORN
        # Nobody may find the keys that torn weights have made.
        self._requests.salt += 1
        self._requests.refuse(
            f"engine {self._index} holds torn weights and refuses to generate until the next sync: {text}"
        )

    async def sleep(self, level: int) -> None:
        """Free the GPU's memory: weights to the host (1) or dropped (2), and the KV cache. Ends requests."""
        await self._llm.sleep(level=level)
        self._asleep = frozenset({"weights", "kv_cache"})
        if level > 1:
            self._state = State.TORN
            self._requests.refuse(f"engine {self._index} dropped its weights in sleep(level=2): wake it up and sync")

    async def wake_up(self, tags: list[str]) -> None:
        """Take the memory of `tags` back; all of it when `tags` is empty."""
        await self._llm.wake_up(tags=tags or None)
        self._asleep = self._asleep - set(tags) if tags else frozenset()

    def shutdown(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; `EngineError` with the workers' own text if any raises."""
        try:
            outcomes = await self._llm.collective_rpc("rollcast_call", args=(method, args))
        except Exception as error:
            raise EngineError(named(self._index, VLLM_WRAPPING.sub("", str(error)))) from error
        if texts := [text for text, _ in outcomes if text is not None]:
            raise EngineError(named(self._index, "; ".join(dict.fromkeys(texts))))
        return [result for _, result in outcomes]

    async def _ring(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker at once, whatever vLLM is doing; else as `call`."""
        try:
            return await self._bells.ring(method, *args)
        except RuntimeError as problem:
            raise EngineError(named(self._index, str(problem))) from None
