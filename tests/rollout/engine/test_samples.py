"""A sample on its way, made of what vLLM hands out."""

from typing import Any

import pytest

from rollcast.rollout.engine.samples import Draft, Switch
from rollcast.rollout.protocol.sampling import Sampling

logprobs = pytest.importorskip("vllm.logprobs")
outputs = pytest.importorskip("vllm.outputs")
START = [Switch(3, {})]


def flat(*positions: dict[int, float] | None) -> Any:
    """One position a dict; its own token first."""
    made = logprobs.FlatLogprobs()
    for position in positions:
        made.append({token: logprobs.Logprob(logprob) for token, logprob in (position or {}).items()})
    return made


def output(tokens: list[int], found: Any, finish_reason: str | None = None) -> Any:
    return outputs.CompletionOutput(0, "", tokens, None, found, finish_reason=finish_reason)


def draft() -> Draft:
    return Draft([1, 2, 3], Sampling(max_tokens=8, prompt_logprobs=True), 0)


def test_a_token_has_its_own_log_probability_and_not_the_likeliest_ones() -> None:
    its = draft()
    its.begin()
    piece = its.take(output([7, 8], flat({7: -2.0, 9: -0.1}, {8: -0.5})), 1, START, ended=False)
    assert (piece.token_ids, piece.logprobs) == ([7, 8], [-2.0, -0.5])
    assert its.spans == ((3, 0),) and its.finish_reason is None


def test_a_stream_that_ends_without_a_token_does_not_have_its_log_probabilities_twice() -> None:
    its = draft()
    its.begin()
    its.take(output([7], flat({7: -2.0})), 1, START, ended=False)
    # As vLLM before 0.29 ends a stream that was aborted.
    piece = its.take(output([], flat({7: -2.0}), "abort"), 1, START, ended=True)
    assert (piece.token_ids, piece.logprobs, piece.finish_reason) == ([], [], "abort")
    assert its.completion().logprobs == [-2.0]


def test_a_token_without_a_log_probability_is_no_completion() -> None:
    its = draft()
    its.begin()
    with pytest.raises(AssertionError):
        its.take(output([7, 8], flat({7: -2.0}, None)), 1, START, ended=False)


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    its = draft()
    prompt_logprobs = flat(None, {2: -1.0}, {3: -0.25, 5: -0.1}, {7: -9.0})
    its.take_prompt(outputs.RequestOutput("request", None, its.prompt, prompt_logprobs, [], finished=False))
    assert its.prompt_logprobs == [None, -1.0, -0.25]
