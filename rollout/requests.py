"""Requests to vLLM, and the policy versions that each is run under (engine process)."""

import asyncio
from typing import Any

from rollcast.rollout.errors import EngineError
from rollcast.rollout.records import Completion, Sampling


class Requests:
    """Samples from one `AsyncLLM`. Everything runs on one event loop."""

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...]) -> None:
        self._llm = llm
        self._index = index
        self._eos_token_ids = eos_token_ids
        self._count = 0
        self._history = [0]
        self._waiting: set[asyncio.Task[list[Completion]]] = set()
        self.refusal = ""
        """Why nothing is served, if so."""
        self.next_version = False
        """Whether requests that arrive now will run under the next version only."""
        self.salt = 0
        """Requests with different salts share no prefix cache."""

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._history[-1]

    @property
    def idle(self) -> bool:
        return not self._waiting

    def advance(self, version: int) -> None:
        """From now on tokens are of `version`."""
        if version != self.version:
            self._history.append(version)
        self.next_version = False

    async def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Sample `sampling.n` completions of each prompt; groups in the order of the prompts."""
        if self.refusal:
            raise EngineError(self.refusal)
        tasks = [asyncio.create_task(self._sample(prompt, sampling)) for prompt in prompts]
        self._waiting.update(tasks)
        try:
            return await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            raise EngineError(self.refusal or f"engine {self._index} ended the request") from None
        finally:
            for task in tasks:
                task.cancel()
            self._waiting.difference_update(tasks)

    def refuse(self, why: str) -> None:
        """End every request, and serve none until `refusal` is empty again."""
        self.refusal = why
        for task in self._waiting:
            task.cancel()

    async def _sample(self, prompt: list[int], sampling: Sampling) -> list[Completion]:
        self._count += 1
        first = len(self._history) - (0 if self.next_version else 1)
        request = {"prompt_token_ids": prompt, "cache_salt": f"rollcast-{self.salt}"}
        outputs: list[Any] = []
        async for final in self._llm.generate(request, self._params(sampling), f"rollcast-{self._count}"):
            outputs = final.outputs
        # Nothing after `first` if the sync that had paused this engine was abandoned.
        versions = tuple(self._history[first:] or self._history[-1:])
        return [_completion(output, versions) for output in outputs]

    def _params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
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


def _completion(output: Any, versions: tuple[int, ...]) -> Completion:
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, logprobs, output.finish_reason or "abort", versions)
