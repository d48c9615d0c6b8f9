"""Samples while they are generated: their tokens, and the policy versions these are from (engine process)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling

Spans = tuple[tuple[int, int], ...]
"""(policy version, index of its first token), oldest first."""
# Distance between the seeds of a sample and of its continuation: the same random numbers must not be drawn again.
SEED_STEP = 1_000_003


@dataclass(frozen=True, slots=True)
class Switch:
    """One switch of the engine to new weights."""

    version: int
    tokens: Mapping[int, int]
    """vLLM request number -> its output tokens from older versions. Without the requests that had not run yet."""


class SampleState:
    """The state of one sample, which several vLLM requests may generate, one after the other."""

    def __init__(self, prompt: list[int], sampling: Sampling, index: int) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.index = index
        """Index among the samples of the prompt."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.spans: Spans = ()
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[float | None] | None = None
        self._cached_tokens: int | None = None
        # Tokens and spans of the earlier vLLM requests.
        self._before: tuple[int, Spans] = (0, ())

    def begin(self) -> None:
        """Note that a new vLLM request continues the sample."""
        self._before = len(self.token_ids), self.spans

    def take(self, output: Any, number: int, switches: Sequence[Switch], *, aborted: bool) -> Piece:
        """Add and return what vLLM request `number` has generated since the last call: a `CompletionOutput`.

        A request with finish reason "abort" ends the sample only if `aborted`.
        """
        first, (count_before, spans_before) = len(self.token_ids), self._before
        tokens = list(output.token_ids)
        # vLLM before 0.29 ends a stream without a new token by repeating all log-probabilities.
        logprobs = [each for each in token_logprobs(output.logprobs)[: len(tokens)] if each is not None]
        assert len(logprobs) == len(tokens)
        self.token_ids += tokens
        self.logprobs += logprobs
        new_spans = spans_of(switches, number, len(self.token_ids) - count_before)
        self.spans = join_spans(spans_before, [(version, count_before + start) for version, start in new_spans])
        if output.finish_reason is not None and (output.finish_reason != "abort" or aborted):
            self.finish_reason = output.finish_reason
        elif len(self.token_ids) == self.sampling.max_tokens:
            self.finish_reason = "length"
        return Piece(tokens, logprobs, spans_from(self.spans, first), self.finish_reason)

    def take_prompt(self, output: Any) -> None:
        """Add what vLLM's `RequestOutput` has about the prompt: the first time, and if it is complete."""
        if self._cached_tokens is None and self.token_ids:
            self._cached_tokens = output.num_cached_tokens
        logprobs = output.prompt_logprobs
        if self.prompt_logprobs is None and logprobs is not None and len(logprobs) >= len(self.prompt):
            self.prompt_logprobs = token_logprobs(logprobs)[: len(self.prompt)]

    def completion(self) -> Completion:
        """Return the sample, which is finished."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            spans=self.spans,
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=self._cached_tokens or 0,
        )

    def params(self, *, eos_token_ids: Sequence[int], stream: bool) -> Any:
        """Return vLLM's `SamplingParams` for the tokens that are missing."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, count = self.sampling, len(self.token_ids)
        prompt_logprobs = sampling.prompt_logprobs and self.index == 0 and self.prompt_logprobs is None
        return SamplingParams(
            max_tokens=sampling.max_tokens - count,
            min_tokens=max(sampling.min_tokens - count, 0),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=None if sampling.seed is None else sampling.seed + self.index + SEED_STEP * count,
            stop_token_ids=[*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)],
            # `stop_token_ids` are all. vLLM would add the end token of its tokenizer, where it has one.
            ignore_eos=True,
            logprobs=0,
            # Not an object for each token: Python's garbage collector would scan them again and again.
            flat_logprobs=True,
            prompt_logprobs=0 if prompt_logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )


def token_logprobs(flat: Any) -> list[float | None]:
    """Return the log-probability of each position's own token, the first in vLLM's `FlatLogprobs`; None without one."""
    positions = zip(flat.start_indices, flat.end_indices, strict=True)
    return [flat.logprobs[start] if start < end else None for start, end in positions]


def spans_of(switches: Sequence[Switch], number: int, count: int) -> Spans:
    """Return the spans of the first `count` tokens of vLLM request `number`, which started under the first switch."""
    start, *later = switches
    spans: Spans = ((start.version, 0),)
    for switch in later:
        position = switch.tokens.get(number, 0)
        if position >= count:
            break
        spans = join_spans(spans, [(switch.version, position)])
    return spans


def join_spans(spans: Spans, later: Iterable[tuple[int, int]]) -> Spans:
    """Return the spans and the later ones as one sequence, without those that have no token."""
    joined = list(spans)
    for version, start in later:
        if joined and joined[-1][1] == start:
            joined.pop()
        if not joined or joined[-1][0] != version:
            joined.append((version, start))
    return tuple(joined)


def spans_from(spans: Spans, first: int) -> Spans:
    """Return the spans of the tokens from `first` on, counted from there."""
    return join_spans((), [(version, max(start - first, 0)) for version, start in spans])
