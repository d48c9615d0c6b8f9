"""One vLLM engine: generate, and take part in a sync (engine process)."""

import asyncio
import re
from enum import Enum
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from rollcast.rollout.errors import EngineError
from rollcast.rollout.records import Completion, JoinGroup, Launch, Receive, Sampling, WorkerTimes
from rollcast.rollout.requests import Requests
from rollcast.rollout.scheduling import Scheduling
from rollcast.rollout.starting import start_llm

# What vLLM wraps around a worker's own text.
VLLM_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (Worker failed with error )?|, please check the stack trace above for the root cause$"
)


class State(Enum):
    """Of an engine's weights.

    SERVING --receive--> RECEIVING --commit--> SERVING       (in place: the weights are a mixture meanwhile)
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

    Everything runs on one event loop. Between `receive` and `commit` the weights are a mixture: scheduling is
    paused, and after a failure it stays paused and requests are refused instead of served with torn weights.
    """

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...]) -> None:
        self._llm = llm
        self._index = index
        self._requests = Requests(llm, index=index, eos_token_ids=eos_token_ids)
        self._scheduling = Scheduling(llm)
        self._state = State.SERVING
        self._paused = False
        self._asleep: frozenset[str] = frozenset()
        self._receiving: asyncio.Task[Any] | None = None
        self._received: Receive | None = None
        self._reports: zmq.asyncio.Socket | None = None

    @classmethod
    def start(cls, launch: Launch) -> "Engine":
        """Start vLLM's processes and load the model. Blocks until the engine is ready."""
        return cls(start_llm(launch), index=launch.engine, eos_token_ids=launch.eos_token_ids)

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._requests.version

    @property
    def torn(self) -> str | None:
        """Why the engine refuses to generate, if it does."""
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

    async def prepare(self, manifest: bytes) -> list[str]:
        """Let every worker find where the parameters land. The digest of each worker's plan."""
        self._refuse_asleep()
        return await self.call("rollcast_prepare", manifest)

    async def describe_landing(self) -> list[bytes]:
        """Each worker's landing plan."""
        return await self.call("rollcast_describe_landing")

    async def join(self, request: JoinGroup) -> None:
        """Let every worker join the group of its lane."""
        assignments = [list(msgspec.structs.astuple(assignment)) for assignment in request.assignments]
        arguments = (request.address, assignments, request.walk, request.bucket_bytes, request.timeout_s)
        await self.call("rollcast_join", *arguments)

    async def receive(self, request: Receive) -> list[WorkerTimes]:
        """Receive new weights in all workers. Served when `commit` is called, or at once if `request.alone`."""
        try:
            self._check(request)
            self._receiving = asyncio.current_task()
            phases = await (self._receive_aside(request) if request.mode == "shadow" else self._receive(request))
            self._received = request
            if request.alone:
                await self.commit(request.version)
        except BaseException:
            # A sender that waits for these workers must not wait until its deadline.
            await self.call("rollcast_leave")
            raise
        return [WorkerTimes(request.first_rank + rank, worker) for rank, worker in enumerate(phases)]

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
        """Pause, and let the workers receive into the live weights. The engine is torn until `commit`."""
        arguments = (request.version, request.digests, request.verify, request.unchanged, request.timeout_s)
        return await self._change("rollcast_receive", *arguments, request=request)

    async def _change(self, method: str, *arguments: Any, request: Receive) -> Any:
        """Pause for a call that changes the live weights; stay paused."""

        async def act() -> list[Any]:
            self._state = State.RECEIVING
            return await self.call(method, *arguments)

        self._paused = self._requests.next_version = True
        if request.prefix_cache == "salt":
            # Requests that arrive from now on, which run under the next version.
            self._requests.salt += 1
        try:
            outcome = await self._scheduling.pause_for(request.pause_mode, act, timeout_s=request.timeout_s)
        except TimeoutError as late:
            raise EngineError(f"engine {self._index} {late}") from None
        if not self._requests.idle:
            await self._scheduling.settle()
        return outcome

    async def _receive_aside(self, request: Receive) -> list[dict[str, float]]:
        """Let the workers receive into spare memory while the engine decodes; each says when it is done."""
        reports, address = self._open_reports()
        arguments = (request.version, request.digests, request.verify, request.timeout_s, address)
        workers = len(await self.call("rollcast_receive_aside", *arguments))
        phases: dict[int, dict[str, float]] = {}
        try:
            async with asyncio.timeout(request.timeout_s):
                while len(phases) < workers:
                    version, rank, problem, its = msgspec.msgpack.decode(await reports.recv())
                    if version == request.version and problem:
                        raise EngineError(_named(self._index, problem))
                    if version == request.version:
                        phases[rank] = its
        except TimeoutError:
            raise EngineError(f"engine {self._index} did not receive within {request.timeout_s:.1f} s") from None
        self._state = State.HOLDING
        return [phases[rank] for rank in sorted(phases)]

    def _open_reports(self) -> tuple[zmq.asyncio.Socket, str]:
        """Where workers report what they do beside decoding."""
        if self._reports is None:
            self._reports = zmq.asyncio.Context.instance().socket(zmq.PULL)
            self._reports.bind("tcp://127.0.0.1:*")
        return self._reports, self._reports.get_string(zmq.LAST_ENDPOINT)

    def _refuse_asleep(self) -> None:
        if "weights" in self._asleep:
            raise EngineError(f"engine {self._index} sleeps: its weights cannot be updated before wake_up")

    async def commit(self, version: int) -> None:
        """All engines have the weights: switch to them, treat the prefix cache, set the version, resume."""
        request = self._received
        assert request is not None and request.version == version
        if self._state is State.HOLDING:
            await self._change("rollcast_apply", request=request)
        if request.prefix_cache == "clear" and not await self._scheduling.clear_prefix_cache():
            raise EngineError(f"engine {self._index}: vLLM did not clear its prefix cache")
        self._requests.advance(version)
        self._requests.refusal = ""
        self._state, self._received, self._paused = State.SERVING, None, False
        if self._asleep:
            # vLLM schedules again when its cache is awake, too, and empty.
            return
        await self._scheduling.resume()

    async def abandon(self, text: str) -> None:
        """The sync failed somewhere. Untouched weights serve on; torn ones never do."""
        if self._receiving is not None and not self._receiving.done() and self._state is State.SERVING:
            # Still pausing, or receiving beside: it must not go on after this.
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        if self._state in (State.SERVING, State.HOLDING):
            self._state, self._requests.next_version = State.SERVING, False
            if self._paused:
                self._paused = False
                await self._scheduling.resume()
            return
        self._state = State.TORN
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

    async def fingerprint(self) -> list[dict[str, str]]:
        """Hashes of every live tensor, for each worker."""
        return await self.call("rollcast_fingerprint")

    def shutdown(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; `EngineError` with the workers' own text if any raises."""
        try:
            outcomes = await self._llm.collective_rpc("rollcast_call", args=(method, args))
        except Exception as error:
            raise EngineError(_named(self._index, VLLM_WRAPPING.sub("", str(error)))) from error
        if texts := [text for text, _ in outcomes if text is not None]:
            raise EngineError(_named(self._index, "; ".join(dict.fromkeys(texts))))
        return [result for _, result in outcomes]


def _named(engine: int, text: str) -> str:
    return text if text.startswith(f"engine {engine}") else f"engine {engine}: {text}"
