"""Sampling parameters and completions (every process)."""

import operator
from collections.abc import Sequence

import msgspec

# Response header of the engines' own OpenAI servers: the policy version that answered.
VERSION_HEADER = "x-rollcast-version"


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to sample; names and meaning as in vLLM's `SamplingParams`.

    Raises `ValueError` if `n` or `max_tokens` is less than 1. vLLM validates the rest when it gets a request.
    """

    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    """Whether completions have the log-probabilities of the prompt's own tokens. Such a prompt is computed anew."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n and max_tokens must be at least 1, not {self.n} and {self.max_tokens}")


class Completion(msgspec.Struct, frozen=True):
    """One sampled completion."""

    token_ids: list[int]
    logprobs: list[float]
    """Log-probability of each sampled token, natural log, in the distribution that it was sampled from
    (temperature and top-p applied)."""
    finish_reason: str
    """"stop", "length" or "abort"."""
    spans: tuple[tuple[int, int], ...]
    """(policy version, index of its first token), oldest first. More than one if a sync happened in between."""
    prompt_logprobs: list[float | None] | None = None
    """On request: natural log-probability of each token of the prompt; None for the first, which has no condition."""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were in the prefix cache."""
    engine: int = 0
    """Index of the engine that sampled it."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Policy versions that sampled it, oldest first."""
        return tuple(version for version, _ in self.spans)


class Piece(msgspec.Struct, frozen=True, tag=True):
    """The next tokens of a completion that is streamed."""

    token_ids: list[int]
    logprobs: list[float]
    spans: tuple[tuple[int, int], ...]
    """(policy version, index of its first token in this piece)."""
    finish_reason: str | None
    """As in `Completion`; None until the last piece."""


def plain_tokens(prompt: Sequence[int]) -> list[int]:
    """Return the token ids as Python integers. Raises `ValueError` for anything else."""
    try:
        return list(map(operator.index, prompt))
    except TypeError as error:
        raise ValueError(f"a prompt is a sequence of token ids: {error}") from None
