"""One vLLM engine: generate, sync, sleep (engine process)."""

from typing import Any

from rollcast.rollout.engine.async_llm import Scheduling, start_llm
from rollcast.rollout.engine.deterministic import Batches
from rollcast.rollout.engine.openai.client import VersionedClient
from rollcast.rollout.engine.openai.server import OpenAIDoor
from rollcast.rollout.engine.requests import Requests, Running
from rollcast.rollout.engine.sync import Updates
from rollcast.rollout.engine.workers import Workers
from rollcast.rollout.errors import EngineError
from rollcast.rollout.protocol.messages import Launch
from rollcast.rollout.protocol.sampling import Completion


class Engine:
    """Wraps `AsyncLLM`. Everything runs on one event loop."""

    def __init__(self, llm: Any, launch: Launch) -> None:
        self._llm = llm
        self._index = index = launch.engine
        self._slots = slots = 0 if launch.lora_rank is None else launch.lora_versions
        self._requests = Requests(llm, index=index, eos_token_ids=launch.eos_token_ids, slots=slots)
        self._scheduling = Scheduling(llm)
        self._batches = Batches(self._scheduling)
        self.workers = Workers(llm, index=index, count=launch.tensor_parallel_size, slots=slots)
        self.updates = Updates(
            self.workers, self._requests, self._scheduling, index=index, wakes=launch.sync_asleep == "wake"
        )

    @classmethod
    def start(cls, launch: Launch) -> "Engine":
        """Start vLLM's processes and load the model. Blocks until the engine is ready."""
        return cls(start_llm(launch), launch)

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._requests.version

    @property
    def torn(self) -> str | None:
        """Why the engine refuses to generate, if it does."""
        return self._requests.refusal or None

    @property
    def refusal(self) -> str:
        """Why it generates nothing now, if so."""
        if self._scheduling.asleep:
            return f"engine {self._index} sleeps: call pool.wake_up() first"
        return self._requests.refusal

    @property
    def requests(self) -> int:
        """How many are under way."""
        return self._requests.count

    @property
    def dead(self) -> bool:
        """Whether vLLM has given up."""
        return self._llm.errored

    async def watch(self) -> None:
        """What must be done before the first request."""
        await self.workers.watch()
        # vLLM asks its processes the first time; later requests then go in without a wait.
        await self._llm.get_supported_tasks()

    async def generate(self, request: Running, *, batch: str) -> list[Completion]:
        """Sample `sampling.n` completions of the prompt, in order: at once, or when its batch is run."""
        if batch:
            return await self._batches.take_part(batch, request, self._generate)
        return await self._generate(request)

    async def run_batch(self, batch: str) -> None:
        """Run the batch, which is complete, and wait for its end."""
        await self._batches.run(batch)

    async def _generate(self, request: Running) -> list[Completion]:
        if refusal := self.refusal:
            raise EngineError(refusal)
        return await self._requests.generate(request)

    async def open_to_openai(self, door: OpenAIDoor) -> None:
        """Let vLLM's own server answer at `door`, until the process ends."""
        client = VersionedClient(self._llm, self._requests, refusal=lambda: self.refusal)
        await door.open(client)

    async def abort(self, request_ids: list[str]) -> None:
        """End requests with what they have."""
        self._batches.abort(request_ids)
        await self._requests.abort(request_ids)

    async def sleep(self, level: int) -> None:
        """Free the GPU's memory: weights to the host (1) or dropped (2), and the KV cache. Ends requests."""
        if self._slots and level > 1:
            raise EngineError(f"engine {self._index} gets no base weights back, with lora_rank: use sleep(level=1)")
        if self.updates.busy:
            raise EngineError(f"engine {self._index} is in a sync: let it sleep afterwards")
        # Before anything else: what arrives from now on is refused.
        self._scheduling.fall_asleep()
        self._batches.abort(None)
        await self._requests.abort_all()
        await self.workers.call("rollcast_release")
        await self._scheduling.sleep(level)
        if level > 1:
            self.updates.lose(f"engine {self._index} dropped its weights in sleep(level=2): wake it up and sync")

    async def wake_up(self, tags: list[str]) -> None:
        """Take the memory of `tags` back; all of it when `tags` is empty."""
        await self._scheduling.wake_up(tags)

    def shutdown(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()
