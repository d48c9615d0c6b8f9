"""One vLLM engine: generate, sync, sleep (engine process)."""

from typing import Any

from rollcast.rollout.engine.async_llm import LLMControl, build_async_llm
from rollcast.rollout.engine.deterministic import DeterministicBatches
from rollcast.rollout.engine.openai.client import VersionedClient
from rollcast.rollout.engine.openai.server import OpenAIServer
from rollcast.rollout.engine.requests import PoolRequest, Requests, engine_error
from rollcast.rollout.engine.sync import EngineSync
from rollcast.rollout.engine.workers import Workers
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import Description, EngineSpec
from rollcast.rollout.protocol.sampling import Completion


class Engine:
    """Wraps `AsyncLLM`. Everything runs on one event loop."""

    def __init__(self, llm: Any, spec: EngineSpec) -> None:
        config, slots = spec.config, spec.lora_slots
        self._llm = llm
        self._index = index = spec.engine
        self._lora = slots > 0
        self._requests = Requests(llm, index=index, eos_token_ids=config.eos_token_ids(), slots=slots)
        self._control = LLMControl(llm)
        self._batches = DeterministicBatches(self._control)
        self.workers = Workers(llm, index=index, count=config.tensor_parallel_size, slots=slots)
        wake_for_sync = config.sync_asleep == "wake"
        self.sync = EngineSync(self.workers, self._requests, self._control, index=index, wake_for_sync=wake_for_sync)

    @classmethod
    def start(cls, spec: EngineSpec) -> "Engine":
        """Start vLLM's processes and load the model. Blocks until the engine is ready."""
        return cls(build_async_llm(spec.config), spec)

    @property
    def refusal(self) -> EngineError | None:
        """The error that every request gets now, if the engine serves none."""
        if self._control.asleep:
            return engine_error(self._index, "sleeps: call pool.wake_up() first")
        return self._requests.refusal

    @property
    def dead(self) -> bool:
        """Whether vLLM has given up."""
        return self._llm.errored

    def describe(self, *, pid: int, openai: str | None) -> Description:
        """Return the engine's state; `pid` and `openai` are those of its process."""
        requests, refusal = self._requests, self._requests.refusal
        return Description(
            self._index, pid, requests.version, str(refusal) if refusal else None, requests.count, openai
        )

    async def connect_workers(self) -> None:
        """Connect to the workers. Called before the first request."""
        await self.workers.connect()
        # vLLM asks its processes the first time; later requests then start without that wait.
        await self._llm.get_supported_tasks()

    async def generate(self, request: PoolRequest, *, batch: str) -> list[Completion]:
        """Sample `sampling.n` completions of the prompt, in order: at once, or when the batch runs."""
        if batch:
            return await self._batches.generate(batch, request, self._generate)
        return await self._generate(request)

    async def _generate(self, request: PoolRequest) -> list[Completion]:
        if refusal := self.refusal:
            raise refusal
        return await self._requests.generate(request)

    async def run_batch(self, batch: str) -> None:
        """Run the batch, all of whose requests have arrived, and wait until they are finished."""
        await self._batches.run(batch)

    async def serve_openai(self, server: OpenAIServer) -> None:
        """Start vLLM's own server on this engine. It serves until the process ends."""
        await server.start(VersionedClient(self._llm, self._requests, refusal=lambda: self.refusal))

    async def abort(self, request_ids: list[str]) -> None:
        """End requests with the tokens they have."""
        self._batches.abort(request_ids)
        await self._requests.abort(request_ids)

    async def sleep(self, level: int) -> None:
        """Free GPU memory: weights move to the host (1) or are dropped (2), and the KV cache goes. Ends requests."""
        if self._lora and level > 1:
            raise engine_error(self._index, "cannot restore its base weights with lora_rank: use sleep(level=1)")
        if self.sync.busy:
            raise engine_error(self._index, "is in a sync: let it sleep afterwards")
        # Before anything else: requests that arrive from now on are refused.
        self._control.mark_asleep()
        self._batches.abort(None)
        await self._requests.abort_all()
        await self.workers.call("rollcast_release", phase="sleep")
        await self._control.sleep(level)
        if level > 1:
            self.sync.discard_weights("dropped its weights in sleep(level=2): wake it up and sync")

    async def wake_up(self, tags: list[str]) -> None:
        """Allocate the memory of `tags` again; all of it when `tags` is empty."""
        await self._control.wake_up(tags)

    def shutdown(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()
