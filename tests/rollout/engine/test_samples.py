"""The state of a sample, from vLLM's outputs."""

from typing import Any

import pytest

from rollcast.rollout.engine.samples import SampleState, Switch
from rollcast.rollout.protocol.sampling import Sampling

logprobs = pytest.importorskip("vllm.logprobs")
outputs = pytest.importorskip("vllm.outputs")
START = [Switch(3, {})]


def flat(*positions: dict[int, float] | None) -> Any:
    """Return vLLM's log-probabilities: a dict for each position, its own token first."""
    flat_logprobs = logprobs.FlatLogprobs()
    for position in positions:
        flat_logprobs.append({token: logprobs.Logprob(logprob) for token, logprob in (position or {}).items()})
    return flat_logprobs


def output(tokens: list[int], token_logprobs: Any, finish_reason: str | None = None) -> Any:
    return outputs.CompletionOutput(0, "", tokens, None, token_logprobs, finish_reason=finish_reason)


def new_sample() -> SampleState:
    return SampleState([1, 2, 3], Sampling(max_tokens=8, prompt_logprobs=True), 0)


def test_a_token_has_its_own_log_probability_and_not_the_likeliest_ones() -> None:
    sample = new_sample()
    sample.begin()
    piece = sample.take(output([7, 8], flat({7: -2.0, 9: -0.1}, {8: -0.5})), 1, START, aborted=False)
    assert (piece.token_ids, piece.logprobs) == ([7, 8], [-2.0, -0.5])
    assert sample.spans == ((3, 0),) and sample.finish_reason is None


def test_a_stream_that_ends_without_a_token_does_not_have_its_log_probabilities_twice() -> None:
    sample = new_sample()
    sample.begin()
    sample.take(output([7], flat({7: -2.0})), 1, START, aborted=False)
    # As vLLM before 0.29 ends a stream that was aborted.
    piece = sample.take(output([], flat({7: -2.0}), "abort"), 1, START, aborted=True)
    assert (piece.token_ids, piece.logprobs, piece.finish_reason) == ([], [], "abort")
    assert sample.completion().logprobs == [-2.0]


def test_a_token_without_a_log_probability_is_no_completion() -> None:
    sample = new_sample()
    sample.begin()
    with pytest.raises(AssertionError):
        sample.take(output([7, 8], flat({7: -2.0}, None)), 1, START, aborted=False)


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    sample = new_sample()
    prompt_logprobs = flat(None, {2: -1.0}, {3: -0.25, 5: -0.1}, {7: -9.0})
    sample.take_prompt(outputs.RequestOutput("request", None, sample.prompt, prompt_logprobs, [], finished=False))
    assert sample.prompt_logprobs == [None, -1.0, -0.25]
