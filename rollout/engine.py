"""One vLLM engine: generate, and take part in a sync (engine process; the only user of `AsyncLLM`)."""

import asyncio
import re
from enum import Enum
from typing import Any

import msgspec

from rollcast.rollout.errors import EngineError
from rollcast.rollout.records import Completion, JoinGroup, Launch, Receive, Sampling, WorkerTimes

# What vLLM wraps around a worker's own text.
VLLM_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (Worker failed with error )?|, please check the stack trace above for the root cause$"
)


class State(Enum):
    """Of an engine's weights.

    SERVING --receive--> RECEIVING --commit--> SERVING
                         RECEIVING --abandon--> TORN --receive--> RECEIVING
    """

    SERVING = "serving"
    RECEIVING = "receiving"
    TORN = "torn"


class Engine:
    """Wraps `AsyncLLM` and knows which policy version its weights are.

    Everything runs on one event loop. Between `receive` and `commit` the weights are a mixture: scheduling is
    paused, and after a failure it stays paused and requests are refused instead of served with torn weights.
    """

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...]) -> None:
        self._llm = llm
        self._index = index
        self._eos_token_ids = eos_token_ids
        self._requests = 0
        self._history = [0]
        self._paused = False
        self._state = State.SERVING
        self._why_torn = ""
        self._waiting: set[asyncio.Task[list[Completion]]] = set()
        self._receiving: asyncio.Task[Any] | None = None

    @classmethod
    def start(cls, launch: Launch) -> "Engine":
        """Start vLLM's processes and load the model. Blocks until the engine is ready."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        optional: dict[str, Any] = {} if launch.max_num_seqs is None else {"max_num_seqs": launch.max_num_seqs}
        args: dict[str, Any] = {
            "model": launch.model,
            "dtype": launch.dtype,
            "max_model_len": launch.max_model_len,
            "tensor_parallel_size": launch.tensor_parallel_size,
            "worker_extension_cls": launch.worker_extension_cls,
            "load_format": launch.load_format,
            "seed": launch.seed,
            "enforce_eager": launch.enforce_eager,
            "gpu_memory_utilization": launch.gpu_memory_utilization,
            # Prompts arrive as tokens; the trainer owns the tokenizer. vLLM then knows no end-of-sequence token.
            "skip_tokenizer_init": True,
            # The policy ratio needs the distribution that was sampled from.
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args | optional | launch.engine_args))
        return cls(llm, index=launch.engine, eos_token_ids=launch.eos_token_ids)

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._history[-1]

    @property
    def torn(self) -> str | None:
        """Why the engine refuses to generate, if it does."""
        return self._why_torn if self._state is State.TORN else None

    @property
    def dead(self) -> bool:
        """Whether vLLM has given up."""
        return self._llm.errored

    async def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt; groups in the order of the prompts."""
        if self._state is State.TORN:
            raise EngineError(self._why_torn)
        tasks = [asyncio.create_task(self._sample(prompt, sampling)) for prompt in prompts]
        self._waiting.update(tasks)
        try:
            return await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            raise EngineError(self.torn or f"engine {self._index} ended the request") from None
        finally:
            for task in tasks:
                task.cancel()
            self._waiting.difference_update(tasks)

    async def prepare(self, manifest: bytes) -> list[str]:
        """Let every worker find where the parameters land. The digest of each worker's plan."""
        await self._refuse_asleep()
        return await self.call("rollcast_prepare", manifest)

    async def describe_landing(self) -> list[bytes]:
        """Each worker's landing plan."""
        return await self.call("rollcast_describe_landing")

    async def join(self, request: JoinGroup) -> None:
        """Let every worker join the group of its lane."""
        await self.call(
            "rollcast_join",
            request.transport,
            request.address,
            [list(msgspec.structs.astuple(assignment)) for assignment in request.assignments],
            request.walk,
            request.bucket_bytes,
            request.timeout_s,
        )

    async def receive(self, request: Receive) -> list[WorkerTimes]:
        """Pause, then receive new weights in all workers with one call. The engine is torn until `commit`."""
        try:
            return await self._receive(request)
        except BaseException:
            # A sender that waits for these workers must not wait until its deadline.
            await self.call("rollcast_leave")
            raise

    async def _receive(self, request: Receive) -> list[WorkerTimes]:
        if request.version <= self.version and not request.unchanged:
            raise EngineError(f"engine {self._index} has version {self.version}: {request.version} is not newer")
        if request.unchanged and (self._state is not State.SERVING or request.version != self.version):
            raise EngineError(
                f"engine {self._index} has version {self.version}, {self._state.value}: a self-test needs engines that "
                f"serve version {request.version}, so sync first"
            )
        await self._refuse_asleep()
        self._receiving = asyncio.current_task()
        self._paused = True
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._llm.pause_generation(mode=request.pause_mode, clear_cache=False)
        except TimeoutError:
            late = f"did not pause within {request.timeout_s:.1f} s (pause_mode is {request.pause_mode!r})"
            raise EngineError(f"engine {self._index} {late}") from None
        self._state = State.RECEIVING
        phases = await self.call(
            "rollcast_receive", request.version, request.digests, request.verify, request.unchanged, request.timeout_s
        )
        return [WorkerTimes(request.first_rank + rank, worker) for rank, worker in enumerate(phases)]

    async def _refuse_asleep(self) -> None:
        # vLLM says that a paused engine sleeps, too.
        if not self._paused and await self._llm.is_sleeping():
            raise EngineError(f"engine {self._index} sleeps: its weights cannot be updated before wake_up")

    async def commit(self, version: int, prefix_cache: str) -> None:
        """All engines have the weights: clear the prefix cache if asked to, set the version, resume."""
        if prefix_cache == "clear":
            await self._clear_prefix_cache()
        if version != self.version:
            self._history.append(version)
        self._state = State.SERVING
        self._paused = False
        await self._llm.resume_generation()

    async def abandon(self, text: str) -> None:
        """The sync failed somewhere. Untouched weights serve on; torn ones never do."""
        if self._receiving is not None and not self._receiving.done() and self._state is State.SERVING:
            # Still pausing: it must not go on to receive after this.
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        if self._state is State.SERVING:
            if self._paused:
                self._paused = False
                await self._llm.resume_generation()
            return
        self._state = State.TORN
        self._why_torn = f"engine {self._index} holds torn weights and refuses to generate until the next sync: {text}"
        for task in self._waiting:
            task.cancel()

    async def fingerprint(self) -> list[dict[str, str]]:
        """Hashes of every live tensor, for each worker."""
        return await self.call("rollcast_fingerprint")

    def shutdown(self) -> None:
        """Stop vLLM's processes."""
        self._llm.shutdown()

    async def _clear_prefix_cache(self) -> None:
        """The old weights' keys must not serve new prompts."""
        # vLLM refuses while requests hold blocks, unless it may run those again from their start.
        for reset_running_requests in (False, True):
            if await self._llm.reset_prefix_cache(reset_running_requests=reset_running_requests):
                return
        raise EngineError(f"engine {self._index}: vLLM did not clear its prefix cache")

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker; `EngineError` with the workers' own text if any raises."""
        try:
            outcomes = await self._llm.collective_rpc("rollcast_call", args=(method, args))
        except Exception as error:
            raise EngineError(f"engine {self._index}: {VLLM_WRAPPING.sub('', str(error))}") from error
        if texts := [text for text, _ in outcomes if text is not None]:
            raise EngineError(f"engine {self._index}: {'; '.join(dict.fromkeys(texts))}")
        return [result for _, result in outcomes]

    async def _sample(self, prompt: list[int], sampling: Sampling) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop_token_ids=[*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_token_ids)],
            ignore_eos=sampling.ignore_eos,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._requests += 1
        # A request that arrives during a pause runs under the next version only.
        first = len(self._history) - (0 if self._paused else 1)
        outputs: list[Any] = []
        async for final in self._llm.generate({"prompt_token_ids": prompt}, params, f"rollcast-{self._requests}"):
            outputs = final.outputs
        # Nothing after `first` if the sync that had paused this engine was abandoned.
        versions = tuple(self._history[first:] or self._history[-1:])
        return [_completion(output, versions) for output in outputs]


def _completion(output: Any, versions: tuple[int, ...]) -> Completion:
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, logprobs, output.finish_reason or "abort", versions)
