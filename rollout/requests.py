"""Requests to vLLM, and the policy versions that each is run under (engine process)."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollcast.rollout.errors import EngineError
from rollcast.rollout.records import Completion, Sampling

# What vLLM makes of our request ids: a number of the sample before them, if there are several, and a random end.
REQUEST_ID = re.compile(r"(?:(?P<sample>\d+)_)?rollcast-(?P<number>\d+)(?:-|$)")


@dataclass(frozen=True, slots=True)
class Switch:
    """The engine went over to new weights."""

    version: int
    tokens: Mapping[tuple[int, int], int]
    """By request and sample: how many tokens are of older versions. Requests that had not run yet are left out."""


class Requests:
    """Samples from one `AsyncLLM`. Everything runs on one event loop."""

    def __init__(self, llm: Any, *, index: int, eos_token_ids: tuple[int, ...]) -> None:
        self._llm = llm
        self._index = index
        self._eos_token_ids = eos_token_ids
        self._count = 0
        self._switch = Switch(0, {})
        # By request: the switch that it arrived after, and those since.
        self._running: dict[int, list[Switch]] = {}
        self._waiting: set[asyncio.Task[list[Completion]]] = set()
        self._decided = asyncio.Event()
        self._decided.set()
        self.refusal = ""
        """Why nothing is served, if so."""
        self.salt = 0
        """Requests with different salts share no prefix cache."""

    @property
    def version(self) -> int:
        """Policy version of the weights."""
        return self._switch.version

    def hold(self) -> None:
        """The weights change: what ends from now on may be of some that will not be served, and is kept back.

        What arrives is kept back, too: it must not begin before the change. Until `release`.
        """
        self._decided.clear()

    def release(self) -> None:
        """Hand out what was kept back."""
        self._decided.set()

    def advance(self, version: int, tokens: Mapping[str, int]) -> None:
        """The engine is on `version`; `tokens` is how many each request, by vLLM's id, had before."""
        if version != self.version:
            found = ((REQUEST_ID.match(request), count) for request, count in tokens.items())
            places = ((int(its["number"]), int(its["sample"] or 0), count) for its, count in found if its)
            kept = {(number, sample): count for number, sample, count in places if number in self._running}
            self._switch = Switch(version, kept)
            for switches in self._running.values():
                switches.append(self._switch)
        self.refusal = ""
        self.release()

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
        from vllm.inputs.engine import tokens_input

        await self._decided.wait()
        self._count += 1
        number, outputs = self._count, []
        switches = self._running[number] = [self._switch]
        # In vLLM's own form, which it takes at once: a request must not meet a switch on its way in.
        request = tokens_input(prompt, cache_salt=f"rollcast-{self.salt}")
        try:
            async for final in self._llm.generate(request, self._params(sampling), f"rollcast-{number}"):
                outputs = final.outputs
            await self._decided.wait()
        finally:
            del self._running[number]
        return [_completion(output, spans_of(switches, (number, output.index), output)) for output in outputs]

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


def spans_of(switches: Sequence[Switch], place: tuple[int, int], output: Any) -> tuple[tuple[int, int], ...]:
    """(version, first token) of a sample that arrived under the first of these and was over after the last."""
    start, *later = switches
    spans = [(start.version, 0)]
    for switch in later:
        position = switch.tokens.get(place, 0)
        if position >= len(output.token_ids):
            break
        if position == spans[-1][1]:
            # Not a token in between.
            spans.pop()
        spans.append((switch.version, position))
    return tuple(spans)


def _completion(output: Any, spans: tuple[tuple[int, int], ...]) -> Completion:
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, logprobs, output.finish_reason or "abort", spans)
