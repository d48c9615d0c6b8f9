"""Completions on their way: tokens, and the policy versions that made them (engine process)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollcast.rollout.protocol.sampling import Completion, Piece, Sampling

Spans = tuple[tuple[int, int], ...]
# Between the seeds of a sample and of what goes on from its tokens: the same numbers must not be drawn again.
SEED_STEP = 1_000_003


@dataclass(frozen=True, slots=True)
class Switch:
    """The engine went over to new weights."""

    version: int
    tokens: Mapping[int, int]
    """By vLLM's request: how many tokens are of older versions. Requests that had not run yet are left out."""


class Draft:
    """One sample, which several requests of vLLM's may make, one after the other."""

    def __init__(self, prompt: list[int], sampling: Sampling, index: int) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.index = index
        """Of the prompt's samples."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.spans: Spans = ()
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[float | None] | None = None
        self._cached_tokens: int | None = None
        self._kept: tuple[int, Spans] = (0, ())

    def begin(self) -> None:
        """Another request goes on."""
        self._kept = len(self.token_ids), self.spans

    def take(self, output: Any, number: int, switches: Sequence[Switch], *, ended: bool) -> Piece:
        """Add what request `number` has made since the last call: vLLM's `CompletionOutput`.

        A request that was aborted is the end of the sample only if `ended`.
        """
        first, (kept, spans) = len(self.token_ids), self._kept
        tokens = list(output.token_ids)
        # vLLM before 0.29 gives a stream that ends without a token all it has had, once more.
        logprobs = [each for each in logprobs_of(output.logprobs)[: len(tokens)] if each is not None]
        assert len(logprobs) == len(tokens)
        self.token_ids += tokens
        self.logprobs += logprobs
        found = spans_of(switches, number, len(self.token_ids) - kept)
        self.spans = joined(spans, [(version, kept + start) for version, start in found])
        if output.finish_reason is not None and (output.finish_reason != "abort" or ended):
            self.finish_reason = output.finish_reason
        elif len(self.token_ids) == self.sampling.max_tokens:
            self.finish_reason = "length"
        return Piece(tokens, logprobs, from_token(self.spans, first), self.finish_reason)

    def completion(self) -> Completion:
        """The sample, which is over."""
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
        """vLLM's `SamplingParams` for the tokens that are missing."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        its, count = self.sampling, len(self.token_ids)
        wants_prompt = its.prompt_logprobs and self.index == 0 and self.prompt_logprobs is None
        return SamplingParams(
            max_tokens=its.max_tokens - count,
            min_tokens=max(its.min_tokens - count, 0),
            temperature=its.temperature,
            top_p=its.top_p,
            top_k=its.top_k,
            seed=None if its.seed is None else its.seed + self.index + SEED_STEP * count,
            stop_token_ids=[*its.stop_token_ids, *(() if its.ignore_eos else eos_token_ids)],
            # What ends a sample is said above. vLLM would add its tokenizer's own token, where it has one.
            ignore_eos=True,
            logprobs=0,
            # Not an object for each token, which Python's collector would look at again and again.
            flat_logprobs=True,
            prompt_logprobs=0 if wants_prompt else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )

    def take_prompt(self, found: Any) -> None:
        """Note what vLLM's `RequestOutput` says of the prompt: the first time, and if it is all of it."""
        if self._cached_tokens is None and self.token_ids:
            self._cached_tokens = found.num_cached_tokens
        logprobs = found.prompt_logprobs
        if self.prompt_logprobs is None and logprobs is not None and len(logprobs) >= len(self.prompt):
            self.prompt_logprobs = logprobs_of(logprobs)[: len(self.prompt)]


def logprobs_of(flat: Any) -> list[float | None]:
    """Of each position of vLLM's `FlatLogprobs`, its own token's: the first. None where vLLM says none."""
    places = zip(flat.start_indices, flat.end_indices, strict=True)
    return [flat.logprobs[start] if start < end else None for start, end in places]


def spans_of(switches: Sequence[Switch], number: int, count: int) -> Spans:
    """(version, first token) of `count` tokens of a request that arrived under the first of these."""
    start, *later = switches
    spans: Spans = ((start.version, 0),)
    for switch in later:
        position = switch.tokens.get(number, 0)
        if position >= count:
            break
        spans = joined(spans, [(switch.version, position)])
    return spans


def joined(spans: Spans, more: Iterable[tuple[int, int]]) -> Spans:
    """The spans, of which each ends where the next begins; those without a token are left out."""
    found = list(spans)
    for version, start in more:
        if found and found[-1][1] == start:
            found.pop()
        if not found or found[-1][0] != version:
            found.append((version, start))
    return tuple(found)


def from_token(spans: Spans, first: int) -> Spans:
    """The spans of the tokens from `first` on, counted from there."""
    return joined((), [(version, max(start - first, 0)) for version, start in spans])
